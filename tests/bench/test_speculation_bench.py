"""The bench of drafts: every arm is a row, held against the arm without drafts of the same round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mtp_models
import numpy as np
import pytest
import tiny_models
from replay_model import TINY_TRACE

from mobile_gguf.bench import pass_costs, speculation, speculation_equal
from mobile_gguf.bench.speculation_table import table, verdicts
from mobile_gguf.bench.text import output_matrix
from mobile_gguf.generate.speculation.tuner import Tuner


def run(source: str, speed: float, round_: int, **own: Any) -> dict[str, Any]:
    usual = {
        "budget": "50%",
        "text": "code",
        "fixed": None,
        "mib_per_token": 1.5,
        "needs_per_token": 12.4,
        "drafted": 0,
        "accepted": 0,
    }
    usual |= {"mean_length": 0.0, "predicted": None, "passes": 0, "took": 0.0, "foreseen": 0.0, "off": 0.0}
    speeds = {"per_second": speed, "per_processor_second": 2 * speed}
    return {**usual, **speeds, "source": source, "round": round_, **own}


DRAFTS = {
    "drafted": 40, "accepted": 30, "mean_length": 4.0, "predicted": 1.5,
    "passes": 10, "took": 0.4, "foreseen": 0.36, "off": 1.0,
}  # fmt: skip


def test_gains_are_over_the_same_round() -> None:
    runs = [
        run("off", 10.0, 1), run("ngram", 15.0, 1, **DRAFTS),
        run("off", 20.0, 2), run("ngram", 30.0, 2, **DRAFTS),
        run("ngram", 5.0, 2, fixed=8, **DRAFTS),
    ]  # fmt: skip
    head, off, ngram, held = table(runs)
    assert head[:5] == ["budget", "text", "source", "tokens/s", "gain"]
    assert off == ["50%", "code", "off", "15.0 ±33%", "1.00", "1.00", "1.50", "12", "", "", "", ""]
    assert ngram[2:7] == ["ngram", "22.5 ±33%", "1.50", "1.50", "1.50"]
    assert ngram[7:] == ["12", "60/80", "4.0", "1.50", "40, 36 (±10%)"]
    assert held[2:5] == ["ngram, 8", "5.0 ±0%", "0.25"]


def test_targets_that_are_not_met_are_named() -> None:
    runs = [
        run("off", 10.0, 1), run("auto", 9.6, 1), run("off", 10.0, 1, text="prose"),
        run("auto", 9.0, 1, text="prose", **DRAFTS),
        run("off", 10.0, 1, budget="100%"), run("ngram", 12.0, 1, budget="100%"),
        run("ngram", 10.0, 1, budget="100%", fixed=0), run("ngram", 15.0, 1, budget="100%", fixed=4),
    ]  # fmt: skip
    assert verdicts(runs, 1) == [
        "auto, all budgets and texts: 0.95: 0.90 at the worst (50% prose): NOT MET",
        "ngram on the code, 100%: 1.15: 1.20 at the worst (100% code): met",
        "passes foreseen within 15%: -10% over all of them",
        "the chosen length over the best of a sweep, 100% code: 0.95: 0.80 (length 4)",
    ]
    batch = [run("off", 10.0, 1, budget="100%"), run("auto", 10.2, 1, budget="100%")]
    assert verdicts(batch, 8)[1] == "8 answers at once, 100%: 1.3: 1.02 at the worst (100% code): NOT MET"


def test_a_head_says_the_next_step_so_often() -> None:
    for right in (1.0, 0.8, 0.5):
        following = output_matrix(2000, 2300, 2048, right).argmax(axis=0)[:2000]
        steps = following[:-2] - np.arange(1998)
        assert set(steps) <= {1, 2}
        assert abs((steps == 1).mean() - right) < 0.04
    assert (output_matrix(30, 40, 64).argmax(axis=0)[:29] == np.arange(1, 30)).all()


def measured(
    command: list[str], module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[list[str]]]:
    """The exit code, and the rows of the table that was printed."""
    monkeypatch.setattr(sys, "argv", command)
    code = module.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return code, [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.mark.engine
@pytest.mark.parametrize("at_once", ["1", "2"])
def test_a_run_has_all_arms(
    at_once: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prose = tmp_path / "runs.jsonl", tmp_path / "text"
    prose.write_text("what is said is said again and again " * 20)
    command = ["speculation", str(tiny_models.path("qwen3moe")), "--budgets", "60%", "--texts", "prose"]
    command += ["--prose", str(prose), "--sources", "off,ngram", "--rounds", "1", "--tokens", "12"]
    command += ["--threads", "1", "--ctx-size", "1024", "--at-once", at_once, "--out", str(out)]
    code, rows = measured(command, speculation, monkeypatch, capsys)
    assert code == 0
    assert [row[2] for row in rows] == ["off", "ngram"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["source"] for line in lines[1:]] == ["off", "ngram"]
    assert all(line["tokens"] == 11 * int(at_once) for line in lines[1:])


@pytest.mark.engine
def test_a_trace_is_followed_with_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mobile_gguf.bench import speculation_texts
    from mobile_gguf.bench.build import ensure_model
    from mobile_gguf.bench.synthetic import synthesise_trace

    trace = synthesise_trace(n_layer=2, n_expert=8, k=2, n_prompt=5, n_decode=60)
    model = ensure_model(trace, speculation_texts.scale_model(trace, 4 << 20, 0.5), tmp_path)
    monkeypatch.setattr(speculation_texts, "trace_of", lambda *_: (str(model), trace))
    monkeypatch.setattr(speculation, "trace_of", lambda *_: (str(model), trace))
    monkeypatch.setattr(
        speculation,
        "in_own_process",
        lambda _module, words: speculation.measure(words[-3], words[-1], args(words)),
    )

    def args(words: list[str]) -> Any:
        from argparse import Namespace

        return Namespace(
            sources="off,ngram", threads=1, ctx_size=512, at_once=1, deterministic=False, draft=None,
            model=None, replay=Path("trace"), size="4MiB", tokens=24, rounds=1, sweep=True, prose=None,
            lengths="",
        )  # fmt: skip

    command = ["speculation", "--replay", "trace", "--right", "0.5", "--budgets", "100%", "--sweep"]
    code, rows = measured(command, speculation, monkeypatch, capsys)
    assert code == 0
    assert [row[2] for row in rows] == ["off", "ngram", *(f"ngram, {n}" for n in range(9))]
    assert rows[0][1] == "replay 0.5"
    accepted, drafted = map(int, rows[-1][8].split("/"))
    assert 0 < accepted < drafted


@pytest.mark.engine
def test_what_passes_cost_has_a_row_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pass_costs", str(tiny_models.path("qwen3moe-q4_0")), "--rounds", "1"]
    code, rows = measured(command, pass_costs, monkeypatch, capsys)
    assert code == 0
    assert len(rows) == len(pass_costs.SEQUENCES) * len(pass_costs.TOKENS)
    assert [row[5] != "" for row in rows] == [row[0] == "1" for row in rows]


@pytest.mark.engine
def test_what_is_not_the_same_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sliding window, a latent attention and a hybrid, each source; then with drafts that are believed."""
    from mobile_gguf.generate.speculation import drafting

    names = ("gpt-oss", "deepseek3", "nemotron-h")
    command = ["speculation_equal", *(str(tiny_models.path(name)) for name in names), "--budgets", "60%"]
    command += ["--prompts", "2", "--tokens", "24", "--threads", "1"]
    code, rows = measured(command, speculation_equal, monkeypatch, capsys)
    assert code == 0
    assert len(rows) == 3 * 2 * 3
    assert all(row[-1] == "0" for row in rows)
    for source in ("ngram", "little"):
        assert sum(int(row[5].split("/")[1]) for row in rows if row[3] == source) > 0

    def believing(draft: Any, draw: Any, accept: Any) -> Any:
        for drafted in [*draft, None]:
            token = drafted if drafted is not None else draw()
            yield token, True
            if not accept(token):
                return

    monkeypatch.setattr(drafting, "verified", believing)
    fewer = [*command[:2], *command[4:], "--sources", "little"]
    code, rows = measured(fewer, speculation_equal, monkeypatch, capsys)
    assert code == 1
    assert any(row[-1] != "0" for row in rows)


def test_each_arm_of_a_sweep_is_there() -> None:
    arms = speculation.arms_of(("off", "auto"), True)
    assert arms == [("off", None), ("auto", None), *(("ngram", n) for n in range(Tuner().most + 1))]
    arms = speculation.arms_of(("off", "auto", "ngram", "little"), False, [2, 4])
    assert arms[2:] == [("ngram", 2), ("ngram", 4), ("little", 2), ("little", 4)]
    assert TINY_TRACE.n_steps == 14


@pytest.mark.engine
def test_a_block_is_one_more_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = mtp_models.make(tmp_path / "right.gguf")
    usual = ["--rounds", "1", "--tokens", "40", "--threads", "1", "--ctx-size", "1024", "--texts", "code"]
    command = ["speculation", str(path), "--budgets", "100%", "--sources", "off,auto,mtp", *usual]
    code, rows = measured([*command, "--lengths", "1,4"], speculation, monkeypatch, capsys)
    assert code == 0
    assert [row[2] for row in rows] == ["off", "auto", "mtp, 1", "mtp, 4"]
    accepted, drafted = map(int, rows[-1][8].split("/"))
    assert accepted == drafted > 0
    for wrong in ([str(tiny_models.path("qwen3moe"))], [str(path), "--draft", str(path)]):
        with pytest.raises(SystemExit):
            measured(["speculation", *wrong, "--sources", "mtp"], speculation, monkeypatch, capsys)


@pytest.mark.engine
def test_texts_by_a_block_are_held_against_those_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, plain = mtp_models.make(tmp_path / "right.gguf"), tiny_models.path("qwen3moe")
    command = ["speculation_equal", str(path), str(plain), "--budgets", "5%", "--sources", "mtp"]
    command += ["--prompts", "2", "--tokens", "24", "--threads", "1", "--deterministic", "yes"]
    code, rows = measured(command, speculation_equal, monkeypatch, capsys)
    assert code == 0
    assert [row[3] for row in rows] == ["mtp"]  # the other one has none
    assert rows[0][1] != "5%"  # a layer's experts are more
    accepted, drafted = map(int, rows[0][5].split("/"))
    assert accepted == drafted > 0
