"""What a little pass left out is read ahead for the big one: never other bits, and the counters add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, run, succeeded, tokens

OFF, ON, AUTO = range(3)
BY_ROUTER = 1
PROMPT = tokens(20, 31)
FOLLOWING = tokens(12, 32)
# plain, a bias for the choice, a bias, experts in shards, another kind of router
MODELS = ["qwen3moe", "deepseek3", "gpt-oss", "mixtral-split", "gemma4"]


def big_little(model: str, mode: int) -> list[dict[str, Any]]:
    """Every token little, then again with all experts."""
    little_k = tiny_models.MODELS[model].little_k
    ops: list[dict[str, Any]] = []
    for i, token in enumerate(FOLLOWING):
        pos = len(PROMPT) + i
        one = {"op": "steps", "tokens": [token], "pos": pos}
        ops += [
            {"op": "set_k", "k": little_k}, one, {"op": "prefetch"},
            {"op": "remove", "pos": pos}, {"op": "set_k", "k": 0}, {**one, "save": f"big-{i}"},
        ]  # fmt: skip
    return [
        {"op": "set_prefetch", "mode": mode}, {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
        {"op": "reset_counters"}, *ops, {"op": "prefetch_counters"}, {"op": "counters"},
    ]  # fmt: skip


@pytest.mark.parametrize(("model", "budget"), [*((model, "min") for model in MODELS), ("qwen3moe", "60%")])
def test_what_a_little_pass_left_out_is_read_and_changes_no_logits(model: str, budget: str) -> None:
    straight = [
        {"op": "decode", "tokens": PROMPT},
        {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT), "save": "big"},
    ]
    names = {"off": OFF, "on": ON, "auto": AUTO}
    outcome = succeeded(on_engine(
        run("straight", model, straight, budget),
        *(run(name, model, big_little(model, mode), budget) for name, mode in names.items()),
    ))  # fmt: skip
    for name in names:
        big = np.concatenate([outcome.arrays[f"{name}/big-{i}"] for i in range(len(FOLLOWING))])
        assert_same_bits(big, outcome.arrays["straight/big"], f"{model} {name}")
        ahead, counters = outcome.ops(name, "prefetch_counters")[0], outcome.ops(name, "counters")[0]
        assert ahead["n_queued"] == ahead["n_used"] + ahead["n_wasted"] + ahead["n_unused"], ahead
        assert (ahead["bytes_wasted"] > 0) == (ahead["n_wasted"] > 0)
        assert counters["resident_bytes_peak"] <= outcome.runs[name]["info"]["budget_bytes"]
        hinted = sum(op["status"] for op in outcome.ops(name, "prefetch"))
        assert (hinted > 0) == (name != "off"), name
        assert ahead["n_queued"] <= hinted
        # without a device nobody guesses the next layer
        assert ahead["n_predicted"] == ahead["n_passes"] == ahead["n_passes_on"] == 0


def test_everything_resident_reads_nothing_ahead() -> None:
    outcome = succeeded(on_engine(run("r", "mixtral", big_little("mixtral", ON), 0)))
    assert outcome.ops("r", "prefetch_counters")[0]["n_queued"] == 0
    assert all(op["status"] == 0 for op in outcome.ops("r", "prefetch"))


@pytest.mark.parametrize(("call", "word"), [
    ({"mode": 3}, "prefetch"), ({"mode": -1}, "prefetch"), ({"mode": 1, "predictor": 9}, "predictor"),
], ids=str)  # fmt: skip
def test_unknown_modes_are_refused(call: dict[str, int], word: str) -> None:
    outcome = on_engine(run("r", "mixtral", [{"op": "set_prefetch", **call}]))
    assert outcome.ops("r", "set_prefetch")[0]["status"] == -1, word


def test_a_model_without_a_plain_router_says_so() -> None:
    outcome = on_engine(run("r", "gemma4", [{"op": "set_prefetch", "mode": ON, "predictor": BY_ROUTER}]))
    assert outcome.ops("r", "set_prefetch")[0]["status"] == -2
