"""The budget is a promise: a generation finishes under a hard memory limit that has room for little more.

The model's experts (200 MB) outweigh all else in the process, so a build that keeps them all is killed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import engine_libs
import pytest
import tiny_models
from engine_jobs import on_engine, run, succeeded, tokens
from memory_caps import capped, inside

N_TOKENS = 200
SLACK = 1.10
KILLED = -9


def generation(name: str, budget: int) -> dict[str, Any]:
    """A run that generates N_TOKENS after a prompt of two ubatches and tells its memory at the end."""
    ops = [{"op": "greedy", "tokens": tokens(600, 1), "n": N_TOKENS}, {"op": "counters"}, {"op": "rss"}]
    return run(name, "bulky", ops, budget, n_ctx=1024)


@cache
def uncapped(share: float) -> dict[str, Any]:
    """A run without a limit: its text, its budget, and the memory it needs beside the experts."""
    # a process of its own: this load holds all experts, and a peak once reached is not forgotten
    info = on_engine({**generation("r", 0), "ops": []}).runs["r"]["info"]
    budget = max(info["budget_min_bytes"], int(share * info["expert_bytes"]))
    outcome = succeeded(on_engine(generation("r", budget)))
    counters = outcome.ops("r", "counters")[0]
    return {
        "tokens": outcome.ops("r", "greedy")[0]["tokens"],
        "budget": budget,
        "expert_bytes": info["expert_bytes"],
        "beside": outcome.ops("r", "rss")[0]["peak"] - counters["resident_bytes_peak"],
    }


@pytest.mark.parametrize("share", [0.0, 0.25], ids=["min", "25%"])
def test_generation_finishes_under_a_hard_limit(share: float) -> None:
    free = uncapped(share)
    budget = free["budget"]
    limit = int((free["beside"] + budget) * SLACK)
    assert limit < free["expert_bytes"], "this limit has room for all experts"
    with capped(limit) as group:
        outcome = succeeded(on_engine(generation("r", budget), prefix=inside(group)))
        assert group.oom_kills() == 0
        assert (group.peak_bytes() or limit) > budget, "the process was not in the group"
    generated = outcome.ops("r", "greedy")[0]
    assert len(generated["tokens"]) == N_TOKENS
    assert generated["tokens"] == free["tokens"], "the limit changed the text"
    counters = outcome.ops("r", "counters")[0]
    assert counters["n_evictions"] > 0
    assert counters["resident_bytes_peak"] <= budget


def test_a_full_warm_set_finishes_under_the_same_limit() -> None:
    """All of the budget is taken before the first token, not in the course of the answer."""
    free = uncapped(0.25)
    budget = free["budget"]
    limit = int((free["beside"] + budget) * SLACK)
    job = generation("r", budget)
    spec = tiny_models.MODELS["bulky"]
    every = [[layer, expert] for layer in range(spec.n_layer_moe) for expert in range(spec.n_expert)]
    job["ops"] = [{"op": "warm", "experts": every, "wait": True}, {"op": "warm_counters"}, *job["ops"]]
    with capped(limit) as group:
        outcome = succeeded(on_engine(job, prefix=inside(group)))
        assert group.oom_kills() == 0
    told, counters = outcome.ops("r", "warm_counters")[0], outcome.ops("r", "counters")[0]
    assert 0.9 * budget < told["bytes_read"] < free["expert_bytes"]
    assert outcome.ops("r", "greedy")[0]["tokens"] == free["tokens"], "the warm set changed the text"
    assert counters["resident_bytes_peak"] <= budget


def test_the_limit_is_hard() -> None:
    """The same limit kills a process that keeps all experts: otherwise the test above shows nothing."""
    free = uncapped(0.0)
    limit = int((free["beside"] + free["budget"]) * SLACK)
    with capped(limit) as group:
        with pytest.raises(engine_libs.ChildDiedError) as died:
            on_engine(generation("r", 0), prefix=inside(group))
        assert died.value.returncode == KILLED
        assert group.oom_kills() > 0
