"""The ring of what was routed lately tells what the trace tells, to whoever reads while the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_jobs import assert_same_bits, on_engine, read_trace, run, succeeded, tokens

PROMPT, FOLLOWING = tokens(20, 41), tokens(24, 42)
SIZE = 65536  # MOBILE_ROUTED_MAX
ERR_ARGUMENT, ERR_STATE = -1, -2
STEPS: list[dict[str, Any]] = [
    {"op": "clear"},
    {"op": "decode", "tokens": PROMPT},
    {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT), "save": "logits"},
]
ON, OFF = {"op": "watch", "on": True}, {"op": "watch", "on": False}


def traced(path: Path) -> list[list[int]]:
    """A trace as the ring has it."""
    return [
        [int(row["step"]), int(row["layer"]), int(row["expert"]), int(row["expert_bytes"] > 0)]
        for row in read_trace(path)
    ]


def routed(since: int, n: int, save: str) -> dict[str, Any]:
    return {"op": "routed", "since": since, "n": n, "save": save}


@pytest.mark.parametrize("model", ["deepseek3", "qwen3moe-q4_k"])  # with a dense leading layer, and without
@pytest.mark.parametrize("n", [7, SIZE])
def test_a_reader_in_another_thread_sees_what_the_trace_has(model: str, n: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    outcome = succeeded(on_engine(
        run("r", model, [
            ON, {"op": "trace_start", "path": str(path)},
            {"op": "routed_while", "rounds": 100, "n": n, "save": "seen", "ops": STEPS},
            {"op": "trace_stop"}, OFF,
        ], "40%"),
        run("unwatched", model, STEPS, "40%"),
    ))  # fmt: skip
    result = outcome.ops("r", "routed_while")[0]
    assert result["lost"] == 0
    assert result["n_while_running"] > 0
    seen = outcome.arrays["r/seen"]
    assert seen.tolist() == traced(path)
    assert 0 < seen[:, 3].sum() < len(seen)
    assert_same_bits(outcome.arrays["r/logits"], outcome.arrays["unwatched/logits"], model)


def test_what_is_overwritten_is_lost_and_counted(tmp_path: Path) -> None:
    """More entries than the ring has: of 25 layers with 6 experts a token."""
    path, text = tmp_path / "trace.csv", tokens(600, 43)
    outcome = succeeded(on_engine(run("r", "deepseek2", [
        ON, {"op": "trace_start", "path": str(path)}, {"op": "decode", "tokens": text},
        {"op": "trace_stop"}, OFF,
        routed(0, SIZE, "all"), routed(0, 10, "first"),
        routed(SIZE + 5, SIZE, "later"), {"op": "steps", "tokens": [1], "pos": 600},
        routed(0, SIZE, "still"),
    ], "40%")))  # fmt: skip
    expected = traced(path)
    assert len(expected) > SIZE + 5
    whole, first, later, still = outcome.ops("r", "routed")
    n_lost = len(expected) - SIZE
    assert (whole["status"], whole["next"], whole["lost"]) == (SIZE, len(expected), n_lost)
    assert outcome.arrays["r/all"].tolist() == expected[-SIZE:]
    assert (first["status"], first["next"], first["lost"]) == (10, n_lost + 10, n_lost)
    assert outcome.arrays["r/first"].tolist() == expected[n_lost : n_lost + 10]
    assert later["lost"] == max(0, n_lost - SIZE - 5)
    assert outcome.arrays["r/later"].tolist() == expected[SIZE + 5 :]
    assert still["next"] == whole["next"]  # nobody watched the last step


def test_a_reader_begins_where_it_likes() -> None:
    outcome = succeeded(on_engine(run("r", "mixtral", [
        routed((1 << 64) - 1, 0, "none"), routed(0, 5, "before"),
        ON, {"op": "decode", "tokens": PROMPT},
        routed((1 << 64) - 1, SIZE, "end"), {"op": "steps", "tokens": FOLLOWING[:1], "pos": len(PROMPT)},
        routed(0, SIZE, "all"),
    ], "40%")))  # fmt: skip
    none, before, end, everything = outcome.ops("r", "routed")
    assert [(op["status"], op["next"], op["lost"]) for op in (none, before)] == [(0, 0, 0)] * 2
    assert (end["status"], end["lost"]) == (0, 0)
    step = outcome.arrays["r/all"][end["next"] :]
    assert set(step[:, 0].tolist()) == {len(PROMPT)}
    assert everything["next"] == end["next"] + len(step)
    assert len(np.unique(step[:, 1:3], axis=0)) == len(step)


def test_bad_calls_are_refused() -> None:
    outcome = on_engine(
        run("moe", "mixtral", [routed(0, -1, "x")], "40%"),
        run("dense", "dense", [ON, routed(0, 3, "x")], None),
    )
    assert outcome.ops("moe", "routed")[0]["status"] == ERR_ARGUMENT
    assert outcome.ops("dense", "watch")[0]["status"] == ERR_STATE
    assert outcome.ops("dense", "routed")[0]["status"] == ERR_STATE
