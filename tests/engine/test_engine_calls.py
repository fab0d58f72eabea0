"""Calls of the engine's C API that do not fit: refused with a code and a text, and nothing is changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from engine_jobs import (
    FOLLOWING,
    GOOD_MODEL,
    PROMPT,
    assert_good,
    assert_same_bits,
    good,
    on_engine,
    run,
    succeeded,
)

ERR_ARGUMENT, ERR_STATE = -1, -2  # enum mobile_status


def test_load_parameters_last_for_one_load(tmp_path: Path) -> None:
    """Whether it succeeds or not: a load after a failed one is a plain load."""
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    plain = good("good")
    outcome = on_engine(
        run("missing", tmp_path / "missing.gguf", [], 0), run("after missing", GOOD_MODEL, plain, None),
        run("folder", folder, [], 0), run("after folder", GOOD_MODEL, plain, None),
        run("small", GOOD_MODEL, [], 1), run("after small", GOOD_MODEL, plain, None),
        run("store", GOOD_MODEL, []), run("after store", GOOD_MODEL, plain, None),
    )  # fmt: skip
    for name, loaded in {"missing": False, "folder": False, "small": False, "store": True}.items():
        assert outcome.runs[name]["loaded"] == loaded
        assert outcome.runs[f"after {name}"]["info_status"] == ERR_STATE, f"{name} left its parameters behind"
        assert_good(outcome, f"after {name}")
    assert outcome.runs["store"]["info"] is not None


def test_budget_below_one_layer() -> None:
    smallest = succeeded(on_engine(run("r", GOOD_MODEL, []))).runs["r"]["info"]["budget_min_bytes"]
    outcome = on_engine(
        run("below", GOOD_MODEL, [], smallest - 1),
        run("smallest", GOOD_MODEL, good("good"), smallest),
        run("above all", GOOD_MODEL, good("good"), 1 << 40),
    )
    assert not outcome.runs["below"]["loaded"]
    error = outcome.runs["below"]["load_error"]
    for part in ("budget", str(smallest), str(smallest - 1)):
        assert part in error, error
    assert_good(outcome, "smallest")
    assert_good(outcome, "above all")
    info = outcome.runs["above all"]["info"]
    assert info["budget_bytes"] == info["budget_all_bytes"], "the budget in force is no more than can be used"


def test_dense_model_has_no_experts() -> None:
    """It loads and runs, and says that there is nothing to have fewer of."""
    prompt = {"op": "decode", "tokens": PROMPT}
    outcome = on_engine(run("r", "dense", [
        {**prompt, "save": "before"},
        {"op": "set_k", "k": 1}, {"op": "set_batch_k", "k": [1]}, {"op": "replay", "ids": [[[0]]]},
        {"op": "clear"}, {**prompt, "save": "after"},
    ], 0))  # fmt: skip
    for kind in ("set_k", "set_batch_k", "replay"):
        assert outcome.ops("r", kind)[0]["status"] == ERR_STATE
    assert_same_bits(outcome.arrays["r/after"], outcome.arrays["r/before"], "after refused calls")
    # whether the model counts as one with an empty store or with none
    assert outcome.runs["r"]["info_status"] == ERR_STATE or outcome.runs["r"]["info"]["n_layer_moe"] == 0


def test_model_without_store_refuses() -> None:
    """A model loaded without load parameters is a stock model: asking for fewer experts is an error."""
    calls = [
        {"op": "set_k", "k": 1}, {"op": "set_batch_k", "k": [1]}, {"op": "prefetch"}, {"op": "counters"},
        {"op": "set_prefetch", "mode": 1}, {"op": "prefetch_counters"},
        {"op": "reset_counters"}, {"op": "trace_start", "path": os.devnull}, {"op": "trace_stop"},
    ]  # fmt: skip
    outcome = on_engine(run("r", GOOD_MODEL, [*calls, *good("good")], None))
    for call in calls:
        assert outcome.ops("r", call["op"])[0]["status"] == ERR_STATE, call
    assert_good(outcome, "r")


@pytest.mark.parametrize("settings", [
    {"n_io_threads": 0}, {"n_io_threads": -1}, {"eviction": 7}, {"eviction": -1}, {"io": 9}, {"io": -1},
    {"on_host": 2},
    {"prefault": 2},
], ids=str)  # fmt: skip
def test_bad_load_parameters_are_refused(settings: dict[str, int]) -> None:
    """Nothing is changed by a refused call: the load after it is a plain one."""
    outcome = on_engine(run("r", GOOD_MODEL, good("good"), 0, mobile=settings))
    assert outcome.runs["r"]["set_params"] == ERR_ARGUMENT
    assert outcome.runs["r"]["info_status"] == ERR_STATE
    assert_good(outcome, "r")


def test_a_mapped_load_is_refused() -> None:
    """llama.cpp's load mode mmap, and auto, which maps."""
    modes = {"auto": -1, "mmap": 1}
    outcome = on_engine(
        *(run(name, GOOD_MODEL, [], 1 << 21, load_mode=mode) for name, mode in modes.items()),
        run("next", GOOD_MODEL, good("good")),
    )
    for name in modes:
        assert not outcome.runs[name]["loaded"]
        assert "mmap" in outcome.runs[name]["load_error"]
    assert_good(outcome, "next")


@pytest.mark.parametrize("budget", ["min", 0])
@pytest.mark.parametrize("settings", [{"check_tensors": True}, {"load_mode": 4}], ids=["checked", "direct"])
def test_other_ways_to_load(settings: dict[str, Any], budget: str | int) -> None:
    """check_tensors validates what is loaded, mode dio reads it unbuffered: neither gets in the way."""
    outcome = on_engine(run("r", GOOD_MODEL, good("good"), budget, **settings))
    assert_good(outcome, "r")


def test_bad_calls_change_nothing(tmp_path: Path) -> None:
    spec, n_layer = tiny_models.MODELS[GOOD_MODEL], 4
    bad_replays = {
        "too few layers": [[[0, 1]] * (n_layer - 1)],
        "fewer than top-k": [[[0]] * n_layer],
        "no such expert": [[[0, spec.n_expert]] * n_layer],
        "negative expert": [[[0, -1]] * n_layer],
    }
    outcome = on_engine(run("r", GOOD_MODEL, [
        {"op": "residency", "save": "residency", "size": 3},
        {"op": "trace_start", "path": str(tmp_path / "no" / "such" / "folder.csv")},
        *({"op": "replay", "ids": ids} for ids in bad_replays.values()),
        *good("good"),
    ]))  # fmt: skip
    assert outcome.ops("r", "residency")[0]["status"] == ERR_ARGUMENT
    assert outcome.ops("r", "trace_start")[0]["status"] < 0
    for name, op in zip(bad_replays, outcome.ops("r", "replay"), strict=True):
        assert op["status"] == ERR_ARGUMENT, name
    assert_good(outcome, "r")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_trace_that_cannot_be_written() -> None:
    """The decode goes on; stopping the trace says that it is not whole."""
    ops = [{"op": "trace_start", "path": "/dev/full"}, *good("good"), {"op": "trace_stop"}]
    outcome = on_engine(run("r", GOOD_MODEL, ops))
    assert outcome.ops("r", "trace_stop")[0]["status"] < 0
    assert_good(outcome, "r")


def test_closing_while_reads_are_queued() -> None:
    """A context and its model go away while hints are still being read."""
    ops = [
        {"op": "set_prefetch", "mode": 1}, {"op": "decode", "tokens": PROMPT}, {"op": "set_k", "k": 1},
        {"op": "steps", "tokens": FOLLOWING[:1], "pos": len(PROMPT)}, {"op": "prefetch"},
    ]  # fmt: skip
    names = [f"{i}" for i in range(8)]
    runs = [run(name, GOOD_MODEL, ops, mobile={"n_io_threads": 1}) for name in names]
    outcome = on_engine(*runs, run("next", GOOD_MODEL, good("good")))
    assert sum(outcome.ops(name, "prefetch")[0]["status"] for name in names) > 0
    assert_good(outcome, "next")
