"""The bench of drafts: every arm is a row, held against the arm without drafts of the same round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from mobile_gguf.bench import speculation


def run(source: str, speed: float, round_: int, **own: Any) -> dict[str, Any]:
    usual = {
        "budget": "50%",
        "text": "code",
        "fixed": None,
        "mib_per_token": 1.5,
        "drafted": 0,
        "accepted": 0,
    }
    usual |= {"mean_length": 0.0, "predicted": None}
    speeds = {"per_second": speed, "per_processor_second": 2 * speed}
    return {**usual, **speeds, "source": source, "round": round_, **own}


def test_gains_are_over_the_same_round() -> None:
    drafts = {"drafted": 40, "accepted": 30, "mean_length": 4.0, "predicted": 1.5}
    runs = [
        run("off", 10.0, 1), run("ngram", 15.0, 1, **drafts),
        run("off", 20.0, 2), run("ngram", 30.0, 2, **drafts),
        run("ngram", 5.0, 2, fixed=8, **drafts),
    ]  # fmt: skip
    head, off, ngram, held = speculation.table(runs)
    assert head[:5] == ["budget", "text", "source", "tokens/s", "gain"]
    assert off == ["50%", "code", "off", "15.0 ±33%", "1.00", "1.00", "1.50", "", "", ""]
    assert ngram == ["50%", "code", "ngram", "22.5 ±33%", "1.50", "1.50", "1.50", "60/80", "4.0", "1.50"]
    assert held[2:5] == ["ngram, 8", "5.0 ±0%", "0.25"]


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
    monkeypatch.setattr(sys, "argv", command)
    assert speculation.main() == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["source"] for line in lines[1:]] == ["off", "ngram"]
    assert all(line["tokens"] == 11 * int(at_once) for line in lines[1:])
    assert [line.split("|")[3].strip() for line in capsys.readouterr().out.splitlines()[2:]] == [
        "off",
        "ngram",
    ]
