"""The budget is a promise: a generation finishes under a hard memory limit that has room for little more.

The model's experts (200 MB) outweigh all else in the process, so a build that keeps them all is killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from typing import Any

import engine_libs
import pytest
import tiny_models
from engine_jobs import on_engine, run, succeeded, tokens
from memory_caps import capped, inside
from places import SUPPORT

from mobile_gguf.memory.cap import MemoryCgroup

N_TOKENS = 200
SLACK = 1.10
KILLED = -9
SECONDS = 600


def generation(name: str, budget: int, *before: dict[str, Any], prefault: int = 0) -> dict[str, Any]:
    """A run that generates N_TOKENS after a prompt of two ubatches and tells its memory at the end."""
    ops = [{"op": "greedy", "tokens": tokens(600, 1), "n": N_TOKENS}, {"op": "counters"}, {"op": "rss"}]
    return run(name, "bulky", [*before, *ops], budget, n_ctx=1024, mobile={"prefault": prefault})


def wait_until(what: Any) -> None:
    until = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)


def charged(group: MemoryCgroup) -> int:
    name = "memory.usage_in_bytes" if group.version == 1 else "memory.current"
    return int((group.directory / name).read_text())


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


@pytest.mark.parametrize("prefault", [0, 1], ids=["as it comes", "taken before"])
def test_a_full_warm_set_finishes_under_the_same_limit(prefault: int) -> None:
    """All of the budget is taken before the first token, not in the course of the answer."""
    free = uncapped(0.25)
    budget = free["budget"]
    limit = int((free["beside"] + budget) * SLACK)
    spec = tiny_models.MODELS["bulky"]
    every = [[layer, expert] for layer in range(spec.n_layer_moe) for expert in range(spec.n_expert)]
    named = [{"op": "warm", "experts": every, "wait": True}, {"op": "warm_counters"}]
    with capped(limit) as group:
        job = generation("r", budget, *named, prefault=prefault)
        outcome = succeeded(on_engine(job, prefix=inside(group)))
        assert group.oom_kills() == 0
    told, counters = outcome.ops("r", "warm_counters")[0], outcome.ops("r", "counters")[0]
    assert 0.9 * budget < told["bytes_read"] < free["expert_bytes"]
    assert outcome.ops("r", "greedy")[0]["tokens"] == free["tokens"], "the warm set changed the text"
    assert counters["resident_bytes_peak"] <= budget


def test_slots_taken_before_they_are_needed_stay_within_the_same_limit() -> None:
    """The run begins once all of the budget is there."""
    free = uncapped(0.25)
    budget = free["budget"]
    limit = int((free["beside"] + budget) * SLACK)
    job = generation("r", budget, {"op": "pause", "name": "idle"}, prefault=1)
    with capped(limit) as group:
        full = {"idle": lambda: wait_until(lambda: charged(group) > budget)}
        outcome = succeeded(on_engine(job, prefix=inside(group), on_pause=full))
        assert group.oom_kills() == 0
    assert outcome.ops("r", "greedy")[0]["tokens"] == free["tokens"]
    assert outcome.ops("r", "counters")[0]["resident_bytes_peak"] <= budget


def test_a_budget_beyond_the_limit_is_cut_in_one_line_and_kills_nobody() -> None:
    """Through ``load``, which knows of the limit; the text is that of a run without one."""
    spec = tiny_models.path("bulky")

    def load(*prefix: str) -> dict[str, Any]:
        command = [*prefix, sys.executable, str(SUPPORT / "capped_load_child.py"), str(spec), "90%"]
        environment = engine_libs.child_environment(engine_libs.engine_lib())
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    free = load()
    assert free["notices"] == []
    limit = free["peak"] - free["budget"] // 4
    with capped(limit) as group:
        told = load(*inside(group))
        assert group.oom_kills() == 0
    (notice,) = told["notices"]
    assert "ram_budget 90% may not fit" in notice
    assert "the budget is" in notice
    assert "\n" not in notice
    assert told["resident"] <= told["budget"] < free["resident"]
    assert told["tokens"] == free["tokens"]


def test_the_limit_is_hard() -> None:
    """The same limit kills a process that keeps all experts: otherwise the test above shows nothing."""
    free = uncapped(0.0)
    limit = int((free["beside"] + free["budget"]) * SLACK)
    with capped(limit) as group:
        with pytest.raises(engine_libs.ChildDiedError) as died:
            on_engine(generation("r", 0), prefix=inside(group))
        assert died.value.returncode == KILLED
        assert group.oom_kills() > 0


def test_slots_taken_beyond_the_limit_kill_an_idle_process() -> None:
    """The planted fault: taken before, a budget that the limit has no room for ends a process that waits."""
    free = uncapped(0.0)
    limit = int((free["beside"] + free["budget"]) * SLACK)
    beyond = min(2 * limit, int(0.9 * free["expert_bytes"]))
    assert beyond > limit

    def idle(prefault: int, group: MemoryCgroup) -> None:
        ends = {"idle": lambda: wait_until(lambda: group.oom_kills() > 0) if prefault else None}
        job = run("r", "bulky", [{"op": "pause", "name": "idle"}], beyond, mobile={"prefault": prefault})
        on_engine(job, prefix=inside(group), on_pause=ends)

    with capped(limit) as group:
        idle(0, group)
        assert group.oom_kills() == 0
        with pytest.raises(engine_libs.ChildDiedError):
            idle(1, group)
