"""The device tier on a GPU of this machine, where the installed engine has a backend for one.

Every process that starts a GPU takes seconds: there are seven, and two for the CPU alone.

A software device serves as well: with Mesa's lavapipe an engine built with ``--backend vulkan``
runs all of it. ggml leaves such a device out unless it is named, which is done where there is no other. The
lavapipe of Mesa 22.3 ends a third of all processes with SIGSEGV in a thread of its own, with the stock graph
too, or spoils the heap, so a job that dies of it on such a device is run again.
"""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import numpy as np
import pytest
import tiny_models
from device_jobs import AUTO, CACHE, CPU, FETCH, LAYERS, device_run, on_devices
from device_oracle import N_STEPS, PROMPT, follow
from engine_jobs import on_engine, run, succeeded, tokens
from gpu_oracle import References

pytestmark = pytest.mark.gpu

# float32, biases, quantised
MODELS = ["qwen3moe", "gpt-oss", "qwen3moe-q4_k"]
PLACED = MODELS[:2]
# the host tier's budget; a context on a GPU takes its time, so the other models have each policy once
POLICIES = [(FETCH, "40%"), (CPU, 0), (AUTO, "40%"), (FETCH, 0), (CPU, "40%"), (AUTO, 0)]
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}
# matrices of a prompt in float32, as far as cuBLAS computes them
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
SOFTWARE_DIES = (-signal.SIGSEGV, -signal.SIGABRT)
_LIST = """
import json
from mobile_gguf.engine.devices import all_devices
print(json.dumps([[d.name, d.description] for d in all_devices() if d.type in ("gpu", "igpu")]))
"""


def _list(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _LIST], capture_output=True, text=True, timeout=800, check=False,
        env=engine_libs.child_environment(engine_libs.engine_lib(), **environment),
    )  # fmt: skip


@cache
def gpu() -> tuple[str, str, dict[str, str]]:
    """Name and description of the engine's first GPU, "" without one, and the environment that shows it.

    An engine that cannot list its devices is no engine without one.
    """
    for environment in ({}, {"GGML_VK_VISIBLE_DEVICES": "0", "GGML_VK_DISABLE_FUSION": "1"}):
        done = _list(environment)
        for _ in range(7 if environment else 0):
            if done.returncode in SOFTWARE_DIES:
                done = _list(environment)
        assert done.returncode == 0, f"listing devices ended with {done.returncode}: {done.stderr[-3000:]}"
        found = json.loads(done.stdout.splitlines()[-1])
        if found:
            return found[0][0], found[0][1], environment
    return "", "", {}


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not gpu()[0]:
        pytest.skip("the engine has no GPU backend with a device: `mobile-gguf engine build --backend cuda`")


def on_gpu(*runs: dict[str, Any], **environment: str) -> engine_libs.Outcome:
    _name, description, shown = gpu()
    tries = 8 if "llvmpipe" in description else 1
    for left in reversed(range(tries)):
        try:
            return succeeded(on_devices(*runs, environment=EXACT | shown | environment))
        except engine_libs.ChildDiedError as error:
            if error.returncode not in SOFTWARE_DIES or not left:
                raise
    raise AssertionError


def stock(name: str, model: str | Path, ops: list[dict[str, Any]]) -> dict[str, Any]:
    """A run with all layers on the GPU: a model without load parameters has the stock graph."""
    return device_run(name, model, [], ops, None)


# Where masks are, whole layers have a route op.
LITTLE: list[dict[str, Any]] = [
    {"op": "set_k", "k": 2}, {"op": "clear"},
    *({"op": "decode", "tokens": PROMPT[i : i + 8], "pos": i, "save": f"little {i}"} for i in (0, 8, 16, 24)),
]  # fmt: skip

# Drafts take a device's other kernels, and more slots than a token: one batch of each kind.
_DRAFTED = tokens(46, 32)
BATCHES: list[dict[str, Any]] = [
    {"op": "decode", "tokens": PROMPT},
    *(
        {"op": "decode", "tokens": _DRAFTED[i:j], "pos": len(PROMPT) + i, "save": f"batch {i}"}
        for i, j in ((0, 5), (5, 14), (14, 46))
    ),
]


def rows(outcome: engine_libs.Outcome, name: str) -> np.ndarray:
    """All that a run has saved under names that begin so, [n, n_vocab]."""
    return np.concatenate([outcome.arrays[key] for key in outcome.arrays if key.startswith(name)])


@cache
def on_cpu() -> engine_libs.Outcome:
    """Everything that the CPU alone has to compute, in one process."""
    runs = [run(model, model, [*follow(), *(LITTLE if model in PLACED else [])], 0) for model in MODELS]
    return succeeded(on_engine(*runs, run("batches", MODELS[0], BATCHES, 0), environment=HIDDEN))


def references(model: str, outcome: engine_libs.Outcome) -> References:
    """The CPU's rows, and those of the job's run "stock" and the model."""
    return References(on_cpu().arrays[f"{model}/rows"], outcome.arrays[f"stock {model}/rows"])


@pytest.mark.parametrize("model", MODELS)
def test_every_miss_policy_generates_what_the_cpu_does(model: str) -> None:
    """Two tiers and three, a budget that evicts; evicted slots are poisoned, uploads late."""
    runs = [
        device_run(f"{miss} {host}", model, [], [
            {"op": "device_start", "budget": 0.55, "miss": miss, "poison": 2}, {"op": "reset_counters"},
            *follow(), {"op": "device_counters"}, {"op": "counters"}, {"op": "device_info"},
            {"op": "device_residency", "save": "residency"},
            {"op": "device_settle", "rounds": 100, "ops": follow(save="rows, settled")},
            {"op": "device_counters"},
        ], host)
        for miss, host in POLICIES[: None if model == MODELS[0] else 3]
    ]  # fmt: skip
    outcome = on_gpu(stock(f"stock {model}", model, follow()), *runs)
    expected = references(model, outcome)
    tiny = tiny_models.MODELS[model]
    for spec in runs:
        name = spec["name"]
        expected.assert_followed(outcome, name)
        first, settled = outcome.ops(name, "device_counters")
        host = outcome.ops(name, "counters")[0]
        info = outcome.ops(name, "device_info")[0]["devices"][0]
        assert info["is_gpu"]
        # the prompt passes the cache by, but for a last layer that computes one token
        routed = first["n_hits"] + first["n_misses"]
        assert routed - N_STEPS * tiny.n_layer_moe * tiny.top_k in (0, tiny.top_k)
        assert first["n_fetched"] + first["n_cpu"] == first["n_misses"]
        assert host["n_hits"] + host["n_misses"] >= first["n_misses"]
        n_uploads = first["n_fetched"] + first["n_admitted"]
        assert n_uploads - first["n_evictions"] == outcome.ops(name, "device_residency")[0]["n_resident"]
        # a driver begins a tensor where it may; a budget is of experts
        assert first["resident_bytes"] <= info["pool_bytes"] <= 0.55 * info["expert_bytes"] + 32768
        # how many steps uploads in the background take is the machine's affair
        assert settled["n_hits"] > 0
        assert settled["n_evictions"] > 0


def test_placements() -> None:
    """Whole layers and the cache in turn; all experts; masks on whole layers."""
    runs = [
        device_run(f"{model} {budget}", model, [], [
            {"op": "device_start", "budget": budget, "miss": CPU, "placement": LAYERS, "poison": 1},
            *follow(save="rows, layers"),
            {"op": "device_placement", "placement": CACHE}, *follow(save="rows, cache"),
            {"op": "device_placement", "placement": LAYERS}, *follow(save="rows, layers again"), *LITTLE,
        ], "40%")
        for model in PLACED for budget in (0.6, 1.0)
    ]  # fmt: skip
    outcome = on_gpu(*(stock(f"stock {model}", model, follow()) for model in PLACED), *runs)
    for spec in runs:
        name = spec["name"]
        model = name.split()[0]
        expected = references(model, outcome)
        expected.assert_followed(outcome, name)
        assert len(outcome.ops(name, "follow")) == 3
        little = rows(on_cpu(), f"{model}/little")
        References(little, little).assert_close(rows(outcome, f"{name}/little"), f"{name}, little")


def test_batches_use_the_cache() -> None:
    model = MODELS[0]
    start = {"op": "device_start", "budget": 0.55, "miss": FETCH, "poison": 1}
    outcome = on_gpu(
        stock("stock", model, BATCHES),
        device_run("d", model, [], [start, *BATCHES, {"op": "device_counters"}], "40%"),
    )
    expected = References(rows(on_cpu(), "batches/batch"), rows(outcome, "stock/batch"))
    expected.assert_close(rows(outcome, "d/batch"), "batches")
    assert outcome.ops("d", "device_counters")[0]["n_hits"] > 0


def test_whole_layers_begin_where_a_tensor_may(tmp_path: Path) -> None:
    """Scales of 4 bytes behind three empty slots: Vulkan aborts on a view that begins at byte 12."""
    data = bytearray(tiny_models.path("qwen3moe-scales").read_bytes())
    key = b"qwen3moe.expert_used_count"
    at = data.index(key) + len(key)
    assert struct.unpack_from("<II", data, at) == (4, 4)  # a uint32, of 4
    struct.pack_into("<I", data, at + 4, 3)
    path = tmp_path / "three.gguf"
    path.write_bytes(data)
    start = {"op": "device_start", "budget": 1.0, "placement": LAYERS, "poison": 1}
    ops = [start, *follow(), {"op": "device_info"}]
    outcome = on_gpu(stock("stock", path, follow()), device_run("d", path, [], ops))
    alone = succeeded(on_engine(run("cpu", path, follow(), 0), environment=HIDDEN))
    References(alone.arrays["cpu/rows"], outcome.arrays["stock/rows"]).assert_followed(outcome, "d")
    # all experts are there, a layer each
    assert outcome.ops("d", "device_info")[0]["devices"][0]["n_slots"] >= 4 * 16


def test_a_pool_that_kernels_do_not_reach_is_divided() -> None:
    """200 MB of experts in tensors of at most 24 MiB, as a driver with small buffers would have it."""
    if not gpu()[0].startswith("Vulkan"):
        pytest.skip("no GPU of ggml's Vulkan backend, which alone has a variable that limits buffers")
    start = {"op": "device_start", "budget": 1.0, "miss": FETCH}
    ops = [start, *follow(8), {"op": "device_info"}]
    job = device_run("d", "bulky", [], ops, n_ctx=128, n_ubatch=64)
    limit = str(24 << 20)
    outcome = on_gpu(job, GGML_VK_FORCE_MAX_BUFFER_SIZE=limit, GGML_VK_SUBALLOCATION_BLOCK_SIZE=limit)
    alone = succeeded(on_engine(run("r", "bulky", follow(8), 0, n_ctx=128), environment=HIDDEN))
    expected = alone.arrays["r/rows"]
    References(expected, expected).assert_followed(outcome, "d")
    info = outcome.ops("d", "device_info")[0]["devices"][0]
    assert info["n_slots"] == 8 * 32
