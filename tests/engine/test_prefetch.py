"""Reading ahead changes when bytes are read, never what is computed, and its counters add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, run, succeeded, tokens

OFF, ON, AUTO = range(3)
BY_ROUTER, BY_TRANSITIONS = 1, 2
PROMPT = tokens(20, 31)
FOLLOWING = tokens(24, 32)
# plain routers, a bias for the choice, a bias, latent ones, experts in shards, another kind of router
MODELS = ["qwen3moe", "mixtral", "deepseek3", "gpt-oss", "nemotron-h", "mixtral-split", "gemma4", "glm4moe"]
WITHOUT_ROUTER = {"gemma4", "nemotron-h"}


def generation(save: str, mode: int, **how: int) -> list[dict[str, Any]]:
    return [
        {"op": "set_prefetch", "mode": mode, **how},
        {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
        {"op": "reset_counters"}, {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT), "save": save},
        {"op": "prefetch_counters"}, {"op": "counters"},
    ]  # fmt: skip


def assert_adds_up(ahead: dict[str, int]) -> None:
    assert ahead["n_queued"] == ahead["n_used"] + ahead["n_wasted"] + ahead["n_unused"], ahead
    assert ahead["n_right"] <= ahead["n_predicted"]
    assert (ahead["bytes_wasted"] > 0) == (ahead["n_wasted"] > 0)


@pytest.mark.parametrize(("model", "budget"), [*((model, "min") for model in MODELS), ("qwen3moe", "60%")])
def test_reading_ahead_changes_no_logits(model: str, budget: str) -> None:
    arms = {"off": (OFF, 0), "on": (ON, 0), "transitions": (ON, BY_TRANSITIONS), "auto": (AUTO, 0)}
    runs = [
        run(name, model, generation("steps", mode, predictor=predictor), budget)
        for name, (mode, predictor) in arms.items()
    ]
    outcome = succeeded(on_engine(*runs))
    for name in arms:
        assert_same_bits(outcome.arrays[f"{name}/steps"], outcome.arrays["off/steps"], f"{model} {name}")
        ahead, counters = outcome.ops(name, "prefetch_counters")[0], outcome.ops(name, "counters")[0]
        assert_adds_up(ahead)
        assert counters["resident_bytes_peak"] <= outcome.runs[name]["info"]["budget_bytes"]
        assert (ahead["n_passes_on"] > 0) == (name != "off"), (name, ahead)
    assert outcome.ops("off", "prefetch_counters")[0]["n_queued"] == 0
    assert outcome.ops("on", "prefetch_counters")[0]["by_router"] == (model not in WITHOUT_ROUTER)
    assert outcome.ops("transitions", "prefetch_counters")[0]["by_router"] == 0
    assert outcome.ops("on", "prefetch_counters")[0]["n_passes_on"] == len(FOLLOWING)


def test_small_batches_are_predicted_too() -> None:
    """As drafts are verified: eight tokens at once, some of them little."""
    batches = [
        {
            "op": "decode",
            "tokens": FOLLOWING[i : i + 8],
            "pos": len(PROMPT) + i,
            "k": [0, 1] * 4,
            "save": f"b{i}",
        }
        for i in range(0, 24, 8)
    ]
    runs = [
        run(name, "qwen3moe", [
            {"op": "set_prefetch", "mode": mode}, {"op": "decode", "tokens": PROMPT},
            *batches, {"op": "prefetch_counters"},
        ], "min")
        for name, mode in (("off", OFF), ("on", ON))
    ]  # fmt: skip
    outcome = succeeded(on_engine(*runs))
    for i in range(0, 24, 8):
        assert_same_bits(outcome.arrays[f"on/b{i}"], outcome.arrays[f"off/b{i}"], f"batch {i}")
    assert outcome.ops("on", "prefetch_counters")[0]["n_predicted"] > 0


def test_everything_resident_predicts_nothing() -> None:
    ahead = succeeded(on_engine(run("r", "mixtral", generation("s", ON), 0))).ops("r", "prefetch_counters")[0]
    assert ahead["n_predicted"] == ahead["n_queued"] == ahead["n_passes_on"] == 0


@pytest.mark.parametrize(("call", "word"), [
    ({"mode": 3}, "prefetch"), ({"mode": -1}, "prefetch"), ({"mode": 1, "predictor": 9}, "predictor"),
], ids=str)  # fmt: skip
def test_unknown_modes_are_refused(call: dict[str, int], word: str) -> None:
    outcome = on_engine(run("r", "mixtral", [{"op": "set_prefetch", **call}]))
    assert outcome.ops("r", "set_prefetch")[0]["status"] == -1, word


def test_a_model_without_a_plain_router_says_so() -> None:
    outcome = on_engine(run("r", "gemma4", [{"op": "set_prefetch", "mode": ON, "predictor": BY_ROUTER}]))
    assert outcome.ops("r", "set_prefetch")[0]["status"] == -2


def test_a_replay_is_predicted_by_what_it_routed(tmp_path: Path) -> None:
    """Replayed ids do not come from the router; two alternating steps are learnt at once."""
    model, spec = "qwen3moe", tiny_models.MODELS["qwen3moe"]
    k, n_layer = spec.top_k, spec.config["num_hidden_layers"]
    ids = [
        [[(step * k + layer + i) % spec.n_expert for i in range(k)] for layer in range(n_layer)]
        for step in (0, 1)
    ]
    outcome = succeeded(on_engine(run("r", model, [
        {"op": "replay", "ids": ids}, *generation("s", ON), {"op": "replay", "ids": None},
    ], "min")))  # fmt: skip
    ahead = outcome.ops("r", "prefetch_counters")[0]
    assert ahead["by_router"] == 0
    assert ahead["n_predicted"] > 0
    assert ahead["n_right"] > 0.9 * ahead["n_predicted"]
