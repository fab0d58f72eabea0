"""The warm set: named experts come without a pass, in their order, in nobody's way, and change no result."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import layout_files
import numpy as np
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
    read_trace,
    run,
    succeeded,
)

RESIDENT = 2  # enum mobile_residency
ARGUMENT = -1  # enum mobile_status
NAMED = [[1, 6], [0, 1], [0, 7], [1, 0]]
EVERY = [[layer, expert] for expert in range(8) for layer in range(4)]
MODELS = ["mixtral", "per-expert", "segments", "mixtral-split"]


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny Mixtral of the file's kind."""
    kind = request.param
    if not kind.startswith("mixtral"):
        n_segments = 4 if kind == "segments" else 1
        return layout_files.write_per_expert(tiny_models.path("mixtral"), tmp_path / "m.gguf", n_segments)
    return tiny_models.path(kind)


EACH_FILE = pytest.mark.parametrize("model", MODELS, indirect=True, ids=MODELS)


def warm(experts: list[list[int]], wait: bool = True) -> dict[str, Any]:
    return {"op": "warm", "experts": experts, "wait": wait}


def residency(save: str = "residency") -> dict[str, Any]:
    return {"op": "residency", "save": save}


def resident(outcome: Any, name: str = "r/residency") -> set[tuple[int, int]]:
    return {(int(layer), int(expert)) for layer, expert in np.argwhere(outcome.arrays[name] == RESIDENT)}


def pairs(experts: list[list[int]]) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, expert in experts}


@EACH_FILE
def test_single_tokens_rank_what_they_used(model: Path, tmp_path: Path) -> None:
    """A prompt counts for nothing, and neither does what a little pass leaves out."""
    path = tmp_path / "trace.csv"
    outcome = succeeded(on_engine(run("r", model, [
        {"op": "decode", "tokens": PROMPT}, {"op": "worth"},
        {"op": "trace_start", "path": str(path)},
        {"op": "steps", "tokens": FOLLOWING[:6], "pos": len(PROMPT)},
        {"op": "set_k", "k": 1}, {"op": "steps", "tokens": FOLLOWING[6:], "pos": len(PROMPT) + 6},
        {"op": "trace_stop"}, {"op": "worth"},
    ], "40%")))  # fmt: skip
    before, after = (op["experts"] for op in outcome.ops("r", "worth"))
    assert before == []
    rows = read_trace(path)
    uses = Counter((int(row["layer"]), int(row["expert"])) for row in rows)
    last = {(int(row["layer"]), int(row["expert"])): row["step"] for row in rows}
    assert pairs(after) == set(uses)
    ranks = [(-uses[layer, expert], -last[layer, expert]) for layer, expert in after]
    assert ranks == sorted(ranks)


def test_answers_made_at_once_count_each_and_a_prompt_beside_them_for_nothing(tmp_path: Path) -> None:
    """Rows of a pass that are tokens of answers count as they do in passes of their own."""
    path, n = tmp_path / "trace.csv", len(PROMPT)
    prompts = [{"op": "decode", "tokens": PROMPT, "seqs": [i] * n, "outputs": [n - 1]} for i in range(2)]
    mixed = {
        "op": "decode", "tokens": [*PROMPT, *FOLLOWING[:2]], "pos": [*range(n), n, n],
        "seqs": [*[2] * n, 0, 1], "outputs": [n - 1, n, n + 1],
    }  # fmt: skip
    shared = [
        {"op": "decode", "tokens": FOLLOWING[i : i + 2], "pos": [n + i // 2] * 2, "seqs": [0, 1]}
        for i in (2, 4, 6)
    ]
    outcome = succeeded(on_engine(run("r", "mixtral", [
        *prompts, {"op": "worth"}, {"op": "trace_start", "path": str(path)}, mixed, {"op": "worth"}, *shared,
        {"op": "trace_stop"}, {"op": "worth"},
    ], "40%", n_seq_max=3, kv_unified=True)))  # fmt: skip
    before, beside, after = (op["experts"] for op in outcome.ops("r", "worth"))
    assert before == []
    rows = read_trace(path)
    first = min(row["step"] for row in rows)

    def used(begin: int, end: int) -> list[dict[str, float]]:
        return [row for row in rows if begin <= row["step"] - first < end]

    assert pairs(beside) == {(int(row["layer"]), int(row["expert"])) for row in used(n, n + 2)}
    assert {(row["layer"], row["expert"]) for row in used(0, n)} - pairs(beside), "a prompt uses others"
    uses = Counter((int(row["layer"]), int(row["expert"])) for row in used(n, n + 8))
    last = {(int(row["layer"]), int(row["expert"])): row["step"] for row in used(n, n + 8)}
    assert pairs(after) == set(uses)
    ranks = [(-uses[layer, expert], -last[layer, expert]) for layer, expert in after]
    assert ranks == sorted(ranks)


@EACH_FILE
def test_named_experts_come_without_a_pass(model: Path) -> None:
    """They stand in no answer's counters, and the results are those of a load without."""
    outcome = succeeded(on_engine(run("r", model, [
        {"op": "reset_counters"}, warm(NAMED), residency(), {"op": "counters"}, {"op": "warm_counters"},
        *good("after"), {"op": "counters"}, {"op": "warm_counters"},
    ], "70%"), run("cold", model, good("after"), "70%")))  # fmt: skip
    n = 4 if model.name == "m.gguf" and outcome.ops("r", "warm")[0]["status"] > len(NAMED) else 1
    assert outcome.ops("r", "warm")[0]["status"] == n * len(NAMED)
    assert resident(outcome) == pairs(NAMED)
    counters, used = outcome.ops("r", "counters")
    told, later = outcome.ops("r", "warm_counters")
    assert all(counters[name] == 0 for name in counters if not name.startswith(("op", "resident_bytes")))
    info = outcome.runs["r"]["info"]
    assert 0 < counters["resident_bytes"] <= info["budget_bytes"]
    assert (told["n_read"], told["n_left"], told["n_used"]) == (n * len(NAMED), 0, 0)
    of_one = info["expert_bytes"] // (info["n_layer_moe"] * info["n_expert"] * n)
    assert told["n_read"] * of_one <= told["bytes_read"] <= told["n_read"] * (of_one + 3 * 2 * 4096)
    assert later["bytes_read"] == told["bytes_read"], "reads of the answer were charged to the warm set"
    assert 0 < later["n_used"] + later["n_wasted"] <= later["n_read"]
    assert used["n_misses"] * of_one <= used["bytes_read_demand"], "a miss was charged to nobody"
    for part in ("prompt", "steps"):
        assert_same_bits(outcome.arrays[f"r/after-{part}"], outcome.arrays[f"cold/after-{part}"], part)


@pytest.mark.parametrize("n_io_threads", [1, 4])
def test_the_most_worthy_come_until_the_budget_is_full(n_io_threads: int) -> None:
    spec = tiny_models.MODELS["mixtral"]
    every = [pair for pair in EVERY if pair[0] < spec.n_layer_moe]
    outcome = succeeded(on_engine(run("r", "mixtral", [
        {"op": "reset_counters"}, warm(every), residency(), {"op": "counters"}, {"op": "warm_counters"},
    ], "70%", mobile={"n_io_threads": n_io_threads})))  # fmt: skip
    counters, told = outcome.ops("r", "counters")[0], outcome.ops("r", "warm_counters")[0]
    info = outcome.runs["r"]["info"]
    assert counters["resident_bytes"] <= counters["resident_bytes_peak"] <= info["budget_bytes"]
    n = len(resident(outcome))
    of_one = info["budget_all_bytes"] // len(every)
    assert n == info["budget_bytes"] // of_one, "room was left"
    assert resident(outcome) == pairs(every[:n])
    assert (told["n_read"], told["n_left"], told["n_wasted"], counters["n_evictions"]) == (n, 0, 0, 0)


def test_nothing_goes_for_the_warm_set() -> None:
    """A store that passes have filled: not even what a prompt merely passed through."""
    outcome = succeeded(on_engine(run("r", GOOD_MODEL, [
        *good("first"), residency("before"), warm(EVERY[:8]), residency("after"), {"op": "warm_counters"},
    ], "min")))  # fmt: skip
    assert np.array_equal(outcome.arrays["r/before"], outcome.arrays["r/after"])
    assert outcome.ops("r", "warm_counters")[0]["n_read"] == 0


def test_passes_go_on_beside_it() -> None:
    """Asked for while it is read: results, budget and counters hold; a later list takes the place of it."""
    every = [pair for pair in EVERY if pair[0] < tiny_models.MODELS[GOOD_MODEL].n_layer_moe]
    ops = [warm(every[:2])]  # on a busy machine the others may all come too late
    for name in ("a", "b"):
        ops += [warm(every[::-1], wait=False), *good(name), warm([], wait=False)]
    budgets = {"min": "min", "70%": "70%", "plain": 0, "slots": 1 << 60}
    outcome = succeeded(on_engine(*(
        run(name, GOOD_MODEL, [*ops, {"op": "counters"}, {"op": "warm_counters"}], budget)
        for name, budget in budgets.items()
    )))  # fmt: skip
    for name in budgets:
        counters, told = outcome.ops(name, "counters")[0], outcome.ops(name, "warm_counters")[0]
        for part in ("a", "b"):
            assert_good(outcome, name, part)
        assert told["n_left"] == 0
        # one layer's room is what a pass may need; where all is there nothing is read
        assert (told["n_read"] > 0) == (name == "70%")
        if name in ("min", "70%"):
            assert counters["resident_bytes_peak"] <= outcome.runs[name]["info"]["budget_bytes"]


def test_a_model_may_be_closed_in_the_middle() -> None:
    runs = [run(str(i), GOOD_MODEL, [warm(EVERY[:8], wait=False)], "70%") for i in range(4)]
    outcome = succeeded(on_engine(*runs, run("last", GOOD_MODEL, good("after"), "70%")))
    assert_good(outcome, "last", "after")


@pytest.mark.parametrize("model", ["nemotron-h", "deepseek3"])
def test_layers_without_experts_are_passed_over(model: str) -> None:
    """A hybrid, and one whose first layer is dense: what a run used is what the next one has."""
    ops = [{"op": "decode", "tokens": PROMPT}, {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT)}]
    saved = [{**op, "save": str(i)} for i, op in enumerate(ops)]
    used = succeeded(on_engine(run("r", model, [*saved, {"op": "worth"}], "60%")))
    experts = used.ops("r", "worth")[0]["experts"][:8]
    again = succeeded(on_engine(run("r", model, [warm(experts), residency(), *saved], "60%")))
    assert resident(again) == pairs(experts)
    for i in range(len(ops)):
        assert_same_bits(again.arrays[f"r/{i}"], used.arrays[f"r/{i}"], model)


@pytest.mark.parametrize("pair", [[0, 8], [0, -1], [-1, 0], [99, 0]])
def test_an_expert_that_there_is_not_is_refused(pair: list[int]) -> None:
    outcome = on_engine(run("r", GOOD_MODEL, [warm([[0, 0], pair], wait=False), residency()], "70%"))
    refused = outcome.ops("r", "warm")[0]
    assert (refused["status"], str(pair[1]) in refused["error"]) == (ARGUMENT, True)
    assert resident(outcome) == set()
