"""The device tier on a device whose queue runs as late as it may: what has to be waited for is waited for.

An RPC server has no queue. Here each copy and graph is done when somebody waits for the backend, and not
before, so that host memory which is written too early, or read too early, is found in every run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from device_jobs import AUTO, CACHE, CPU, FETCH, LAYERS, device_run
from device_oracle import FOLLOWING, PROMPT, assert_as_on_cpu, assert_close, follow
from engine_jobs import on_engine, run, succeeded, tokens
from queue_device import build, on_queue

N_STEPS = 24
PLACED = ["qwen3moe", "gpt-oss"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("queue"))


@pytest.mark.parametrize("model", ["qwen3moe", "gpt-oss", "qwen3moe-q4_k", "deepseek3"])
def test_every_miss_policy_gives_the_cpus_logits(model: str, library: Path) -> None:
    """Two tiers and three, a budget that evicts; evicted slots are poisoned, and every hint is taken."""
    runs = [
        device_run(f"{miss} {host}", model, [], [
            {"op": "device_start", "budget": 0.55, "miss": miss, "poison": 1},
            {"op": "set_prefetch", "mode": 1}, *follow(N_STEPS), {"op": "device_counters"},
        ], host)
        for miss in (FETCH, CPU, AUTO) for host in (0, "40%")
    ]  # fmt: skip
    outcome = on_queue(library, *runs)
    for spec in runs:
        assert_as_on_cpu(outcome, spec["name"], model, N_STEPS)
        device = outcome.ops(spec["name"], "device_counters")[0]
        assert device["n_hits"] + device["n_fetched"] > 0 or spec["name"].startswith(str(CPU))


@pytest.mark.parametrize("model", PLACED)
def test_placements_give_the_cpus_logits(model: str, library: Path) -> None:
    """Whole layers, some of them on the host, and the cache in turn."""
    runs = [
        device_run(f"{budget}", model, [], [
            {"op": "device_start", "budget": budget, "miss": CPU, "placement": LAYERS, "poison": 1},
            *follow(N_STEPS), {"op": "device_placement", "placement": CACHE}, *follow(N_STEPS),
            {"op": "device_placement", "placement": LAYERS}, *follow(N_STEPS),
        ], "40%")
        for budget in (0.6, 1.0)
    ]  # fmt: skip
    outcome = on_queue(library, *runs)
    for spec in runs:
        assert_as_on_cpu(outcome, spec["name"], model, N_STEPS)


def test_batches_give_the_cpus_logits(library: Path) -> None:
    """Prompts go through the host's experts, drafts through the slots; nobody waits between two of them."""
    ops: list[dict[str, Any]] = [{"op": "decode", "tokens": PROMPT, "save": "prompt"}]
    pos = len(PROMPT)
    for i, n in enumerate((5, 9, 32, 1, 40)):
        ops.append({"op": "decode", "tokens": tokens(n, 7 + i), "pos": pos, "save": f"batch-{i}"})
        pos += n
    expected = succeeded(on_engine(run("r", "qwen3moe", ops, 0)))
    start = {"op": "device_start", "budget": 0.55, "miss": FETCH, "poison": 1}
    runs = [device_run(f"{host}", "qwen3moe", [], [start, *ops], host) for host in (0, "40%")]
    outcome = on_queue(library, *runs)
    for spec in runs:
        for name in ("prompt", *(f"batch-{i}" for i in range(5))):
            assert_close(
                np.atleast_2d(outcome.arrays[f"{spec['name']}/{name}"]),
                np.atleast_2d(expected.arrays[f"r/{name}"]), name,
            )  # fmt: skip


def test_a_layer_waits_for_its_device_twice(library: Path) -> None:
    """Once for what the route op reads, once for what the slots' kernels are given; a pass for inputs, too.

    A wait takes a GPU and its driver some ten microseconds, in each of dozens of layers.
    """
    spec = tiny_models.MODELS["qwen3moe"]
    steps = {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT)}
    ops = [
        {"op": "device_start", "budget": 1.0, "miss": FETCH}, {"op": "decode", "tokens": PROMPT}, steps,
        {"op": "remove", "pos": len(PROMPT)}, {"op": "queue_waits"}, steps, {"op": "queue_waits"},
    ]  # fmt: skip
    outcome = on_queue(library, device_run("d", "qwen3moe", [], ops))
    before, after = (result["n"] for result in outcome.ops("d", "queue_waits"))
    per_pass = (after - before) / len(FOLLOWING)
    assert per_pass <= 2 * spec.n_layer_moe + 9


def test_host_memory_is_written_after_it_was_copied(library: Path) -> None:
    """The next pass begins on the host while copies of the one before are in the queue."""
    outcome = on_queue(library, device_run("d", "qwen3moe", [], [{"op": "queue_sum"}]))
    assert outcome.ops("d", "queue_sum")[0]["sum"] == 1 * 2 + 2 * 2
