"""``show``: whole transcripts, and a heat map that fits any model into 80 columns."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import DATA
from statistics_files import GOOD, model_file, routing, write_statistics

from mobile_gguf.cli import main
from mobile_gguf.cli.show.heatmap import ASCII, COLOURS, STEPS, UNICODE, WIDTH, heat_map, is_fancy, step_of
from mobile_gguf.convert.calibrate.statistics import RouteCounts
from mobile_gguf.convert.gguf.file import update_gguf
from mobile_gguf.memory.machine import Memory

MIB = 1 << 20


def point(kind: str, value: float, little_k: int, **measured: float) -> dict[str, Any]:
    means = {"kl": 0.0, "agreement": 1.0, "perplexity": 12.0, "big_share": 1.0, "expert_bytes": 2048.0}
    return {"kind": kind, "value": value, "little_k": little_k, "share": 0, **means, **measured}


HEAD = point("head", 0.42, 1, kl=0.031, agreement=0.955, perplexity=12.08, big_share=0.3, expert_bytes=1331.2)
CALIBRATION = {
    "text": "the built-in text",
    "text_sha256": "0123456789abcdef",
    "n_tokens": 16384,
    "head": {"kl": 0.08, "auc": 0.8123, "auc_confidence": 0.741, "thresholds": {"20": 0.6, "40": 0.31}},
    "default": HEAD | {"within_one_percent": True},
    "curves": [
        point("big", 0, 2),
        point("little", 0, 1, kl=0.12, agreement=0.871, perplexity=13.5, big_share=0, expert_bytes=1024),
        point(
            "confidence", 0.7, 1, kl=0.03, agreement=0.95, perplexity=12.1, big_share=0.4, expert_bytes=1536
        ),
        HEAD,
    ],
}
VERIFICATION = {"reasons": [], "worst": {"relative error against Transformers": 2.1e-5}}


@pytest.fixture(autouse=True)
def a_known_machine(monkeypatch):
    memory = Memory(available_bytes=160 * MIB, total_bytes=200 * MIB, source="the machine")
    monkeypatch.setattr("mobile_gguf.api.loading.read_memory", lambda: memory)
    monkeypatch.setattr("mobile_gguf.cli.show.tiers.read_memory", lambda: memory)


@pytest.fixture
def show(capsys, monkeypatch):
    """Runs ``show`` with arguments; returns the exit code, stdout without the file's folder, and stderr."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(path: Path, *arguments: str) -> tuple[int, str, str]:
        code = main(["show", str(path), *arguments])
        out, err = capsys.readouterr()
        return code, out.replace(str(path.parent), "FOLDER"), err.replace(str(path.parent), "FOLDER")

    return run


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    path = model_file(tmp_path / "model.gguf")
    write_statistics(path, GOOD)
    metadata = {
        "mobile.calibration.json": json.dumps(CALIBRATION),
        "mobile.verify.status": "passed",
        "mobile.verify.json": json.dumps(VERIFICATION),
    }
    update_gguf(path, set=metadata)
    return path


def test_a_stock_file(show, tmp_path):
    code, out, err = show(model_file(tmp_path / "model.gguf"))
    assert (code, err) == (0, "")
    assert out == (DATA / "show-stock.txt").read_text()


def test_a_calibrated_file(show, calibrated):
    code, out, err = show(calibrated)
    assert (code, err) == (0, "")
    assert out == (DATA / "show-calibrated.txt").read_text(encoding="utf-8")
    assert max(map(len, out.splitlines())) <= 110
    assert show(calibrated, "--ascii")[1] == out


def test_on_a_terminal_the_map_has_blocks_and_colours(show, calibrated, monkeypatch):
    plain = show(calibrated)[1]
    monkeypatch.setattr("mobile_gguf.cli.show.heatmap.is_fancy", lambda _stream: True)
    fancy = show(calibrated)[1]
    assert fancy == (DATA / "show-terminal.txt").read_text(encoding="utf-8")
    bare = re.sub("\033\\[[0-9;]*m", "", fancy)
    assert set(UNICODE) & set(bare) > {" "}
    assert [len(line) for line in bare.splitlines()] == [len(line) for line in plain.splitlines()]
    assert show(calibrated, "--ascii")[1] == plain


def test_json_has_everything(show, calibrated):
    code, out, _ = show(calibrated, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["calibration"] == CALIBRATION
    assert facts["verification"] == {"status": "passed", "result": VERIFICATION}
    np.testing.assert_allclose(facts["statistics"]["hotness"], GOOD.hotness, atol=1e-5)
    assert facts["statistics"]["layers"] == [1, 2]
    assert facts["statistics"]["n_tokens"] == 50
    assert (facts["layout"], facts["segments"], facts["alignment"]) == ("stacked", 1, None)
    shares = {tier["budget"]: tier["n_experts"] for tier in facts["tiers"]["shares"]}
    assert shares["100%"] == 12
    assert facts["tiers"]["memory_available_bytes"] == 160 * MIB


def test_json_of_a_stock_file(show, tmp_path):
    facts = json.loads(show(model_file(tmp_path / "model.gguf"), "--json")[1])
    assert (facts["calibration"], facts["statistics"]) == (None, None)
    assert facts["verification"] == {"status": None, "result": None}


def test_statistics_without_a_head(show, tmp_path):
    path = model_file(tmp_path / "model.gguf")
    write_statistics(path, GOOD)
    out = show(path)[1]
    assert "calibration" not in out
    assert "price of" not in out
    assert "hotness: layers x experts, over 50 tokens\n" in out


def test_a_failed_verification_says_why(show, calibrated):
    failed = {"reasons": ["prompt 2: another argmax", "layer 3"], "worst": {}}
    update_gguf(calibrated, set={"mobile.verify.status": "failed", "mobile.verify.json": json.dumps(failed)})
    assert "verified                failed: prompt 2: another argmax; layer 3\n" in show(calibrated)[1]


def test_memory_that_does_not_suffice(show, calibrated, monkeypatch):
    memory = Memory(available_bytes=1 * MIB, total_bytes=8 * MIB, source="cgroup /x")
    monkeypatch.setattr("mobile_gguf.cli.show.tiers.read_memory", lambda: memory)
    code, out, _ = show(calibrated)
    assert code == 0
    assert "--ram-budget auto       does not fit: one layer's experts (96.0 KiB) have no room\n" in out
    problem = json.loads(show(calibrated, "--json")[1])["tiers"]["problem"]
    assert "cgroup /x has 1.0 MiB" in problem
    assert "--ram-budget 100%" in out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mobile.calibration.json", "{"),
        ("mobile.calibration.json", "[1]"),
        ("mobile.calibration.json", 5),
        ("mobile.calibration.json", "[" * 100000),
        ("mobile.calibration.json", json.dumps(CALIBRATION | {"curves": [{"kind": "head"}]})),
        ("mobile.calibration.json", json.dumps(CALIBRATION | {"head": None})),
        ("mobile.calibration.json", json.dumps(CALIBRATION | {"default": HEAD | {"kl": "low"}})),
        ("mobile.calibration.json", json.dumps(CALIBRATION | {"curves": [HEAD | {"kl": float("nan")}]})),
        ("mobile.verify.json", "no"),
        ("mobile.statistics.n_tokens", -1),
    ],
)
def test_a_damaged_file_is_one_line(show, calibrated, key, value):
    update_gguf(calibrated, set={key: value})
    for arguments in ([], ["--json"]):
        code, out, err = show(calibrated, *arguments)
        assert code == 1
        assert (json.loads(out)["error"]["exit_code"] if arguments else out) == (1 if arguments else "")
        assert err.startswith("mobile-gguf: error: FOLDER/model.gguf: ")
        assert err.count("\n") == 1
        assert key in err


def test_a_file_cannot_write_to_the_terminal(show, calibrated):
    hostile = "\033[2Jgone\n\x07"
    point = HEAD | {"kind": hostile}
    calibration = CALIBRATION | {"text": hostile, "curves": [point]}
    update_gguf(
        calibrated,
        set={
            "general.name": hostile,
            "mobile.calibration.json": json.dumps(calibration),
            "mobile.verify.status": hostile,
        },
    )
    out = show(calibrated)[1]
    assert "gone" in out
    assert "\033" not in out
    assert "\x07" not in out


def test_segments_are_shown(show, tmp_path):
    path = model_file(tmp_path / "model.gguf")
    assert "layout                  stacked\n" in show(path)[1]
    from mobile_gguf.convert.gguf.layout import to_mobile

    cut = tmp_path / "cut.gguf"
    to_mobile(path, cut, segments=1)
    assert "layout                  per-expert, aligned to 4096 bytes\n" in show(cut)[1]


# the heat map


def cells_of(line: str) -> str:
    return line[line.index("|") + 1 : line.rindex("|")]


@pytest.mark.parametrize("n_expert", [1, 2, 6, 16, 60, 75, 76, 77, 128, 160, 256, 384, 512, 4096])
def test_a_map_fits_80_columns_and_shows_means(n_expert):
    rng = np.random.default_rng(n_expert)
    hotness = rng.gamma(0.7, size=(3, n_expert)).astype(np.float32) / n_expert
    lines = heat_map(hotness, [0, 7, 100], fancy=False)
    assert max(map(len, lines)) <= WIDTH
    columns = len(cells_of(lines[1]))
    n_bin = next(n for n in range(1, n_expert + 1) if -(-n_expert // n) <= WIDTH - 6)
    n_cells = -(-n_expert // n_bin)
    assert columns % n_cells == 0
    for row, line in zip(hotness.astype(np.float64), lines[1:4], strict=True):
        shown = cells_of(line)[:: columns // n_cells]
        for cell, mark in enumerate(shown):
            mean = np.mean(row[cell * n_bin : (cell + 1) * n_bin]) / np.mean(row)
            near = {ASCII[step_of(mean * (1 + e))] for e in (-1e-5, 0, 1e-5)}
            assert mark in near
    assert (f"{n_bin} to a column" in lines[0]) == (n_bin > 1 and n_cells > 12)


def test_a_layer_that_was_not_run_says_so():
    hotness = np.array([[0.5, 0.5], [0.0, 0.0]], np.float32)
    assert heat_map(hotness, [3, 4], fancy=False)[2] == "4 | not run"


def test_steps():
    assert [step_of(bound) for bound in STEPS] == list(range(len(STEPS)))
    assert step_of(0.2499) == 0
    assert step_of(99) == len(STEPS) - 1
    assert len(ASCII) == len(UNICODE) == len(COLOURS) == len(STEPS)


class Terminal(io.StringIO):
    def __init__(self, encoding: str = "utf-8", tty: bool = True) -> None:
        super().__init__()
        self._encoding, self._tty = encoding, tty

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._tty


def test_only_a_terminal_that_can_is_drawn_on(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_fancy(Terminal())
    assert is_fancy(Terminal("UTF8"))
    assert not is_fancy(Terminal(tty=False))
    assert not is_fancy(Terminal("ascii"))
    monkeypatch.setenv("TERM", "dumb")
    assert not is_fancy(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")
    assert not is_fancy(Terminal())


def test_a_large_model_is_shown_quickly_and_whole(show, tmp_path):
    """128 experts in two layers: half as many columns, all of them there."""
    path = model_file(tmp_path / "model.gguf", n_expert=128)
    ids, weights = routing(1, 2, 200, 128, 2)
    counts = RouteCounts((1, 2), 128, 2)
    counts.add(ids, weights)
    write_statistics(path, counts.statistics())
    out = show(path)[1]
    assert "expert 0, 2 to a column" in out
    assert len(cells_of(out.splitlines()[-2])) == 64
