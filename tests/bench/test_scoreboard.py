"""The scoreboard: systems of one model side by side, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from mobile_gguf.cli import main


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scoreboard") / "text"
    rng = np.random.default_rng(3)
    path.write_text(" ".join("".join(rng.choice(list("etaoinsh"), 5)) for _ in range(600)))
    return path


def command(text: Path, *more: str) -> list[str]:
    model = str(tiny_models.path("olmoe"))
    return [
        "bench", "--scoreboard", model, "--text", str(text), "--tokens", "512", "--repeats", "2",
        "--budget", "60%", "-t", "1", *more,
    ]  # fmt: skip


def test_every_system_is_a_row(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systems = "exact,drop:1,buddy,big-little,auto"
    out, picture = tmp_path / "board", tmp_path / "board.svg"
    code = main(command(text, "--systems", systems, "--out", str(out), "--plot", str(picture)))
    said = capsys.readouterr()
    assert code == 0, said.err
    board = json.loads(out.with_suffix(".json").read_text())
    scores = {score["system"]: score for score in board["scores"]}
    assert list(scores) == ["exact", "drop:1", "auto"]
    for score in scores.values():
        assert len(score["speeds"]) == 2
        assert min(score["speeds"]) > 0
    exact, drop = scores["exact"]["price"], scores["drop:1"]["price"]
    assert (exact["kl"], exact["agreement"]) == (0, 1)
    assert exact["demand_bytes"] > drop["demand_bytes"] > 0
    assert drop["kl"] > 0
    # nobody calibrated it: mode auto begins exactly, and keeps what it may lose
    assert scores["auto"]["price"]["kl"] <= 0.02
    assert [note.split(":")[0] for note in board["notes"][:2]] == [
        "buddy is left out",
        "big-little is left out",
    ]
    assert board["failures"] == []
    assert board["positions"] == 2 * (256 - 32 - 1)
    assert out.with_suffix(".md").read_text().strip() == said.out.strip()
    assert "drop:1" in picture.read_text()


def test_a_run_that_fails_is_a_line_and_no_row(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cap that the process itself does not fit under."""
    code = main(command(text, "--systems", "exact", "--slack", "20MiB", "--json"))
    said = capsys.readouterr()
    board = json.loads(said.out)
    if not board["capped"]:
        pytest.skip("no memory cgroup can be made here")
    assert code == 1
    assert board["scores"] == []
    assert (
        board["failures"]
        == ["exact 60% failed: killed: it does not fit under its memory cap; give more --slack"] * 2
    )
    assert board["failures"][0] in said.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--systems", "dropp:1"], "'dropp' is none of exact, little"),
        (["--text", "/none"], "--text /none: there is no such file"),
        (["--tokens", "100"], "--tokens 100: a scoreboard takes at least 512"),
        (["--budget", "auto"], "--budget auto: a benchmark needs sizes"),
        (["--plot", "board.txt"], "--plot board.txt must end in .png or .svg"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    text: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(text, *more)) == 2
    assert says in capsys.readouterr().err
