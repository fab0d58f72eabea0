"""The device tier on a GPU of this machine, where the installed engine has a backend for one.

A software device serves as well: with Mesa's lavapipe an engine built with ``--backend vulkan``
runs all of it. ggml leaves such a device out unless it is named, which is done where there is no other. The
lavapipe of Mesa 22.3 ends a third of all processes with SIGSEGV in a thread of its own, with the stock graph
too, so a job that dies of it on such a device is run again.
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
from engine_jobs import on_engine, run, succeeded, tokens

pytestmark = pytest.mark.gpu

# float32, biases, quantised
MODELS = ["qwen3moe", "gpt-oss", "qwen3moe-q4_k"]
PROMPT = tokens(40, 31)  # more than fit the cache's batches: its experts go through the host
N_STEPS = 64
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}
_LIST = """
import json
from mobile_gguf.engine.devices import all_devices
print(json.dumps([[d.name, d.description] for d in all_devices() if d.type in ("gpu", "igpu")]))
"""


@cache
def gpu() -> tuple[str, str, dict[str, str]]:
    """Name and description of the engine's first GPU, "" without one, and the environment that shows it."""
    for environment in ({}, {"GGML_VK_VISIBLE_DEVICES": "0", "GGML_VK_DISABLE_FUSION": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", _LIST], capture_output=True, text=True, timeout=800, check=False,
            env=engine_libs.child_environment(engine_libs.engine_lib(), **environment),
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else []
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
            return succeeded(on_devices(*runs, environment=shown | environment))
        except engine_libs.ChildDiedError as error:
            if error.returncode != -signal.SIGSEGV or not left:
                raise
    raise AssertionError


def greedy(n: int = N_STEPS) -> list[dict[str, Any]]:
    return [{"op": "clear"}, {"op": "greedy", "tokens": PROMPT, "n": n, "save": "last"}]


@cache
def references(model: str | Path, n: int = N_STEPS) -> tuple[list[int], np.ndarray, np.ndarray, float]:
    """The CPU's tokens and last logits, the stock graph's logits with all layers on the GPU, and how far
    logits may be apart: half as much again as the stock graph on the GPU is from the CPU."""
    cpu = succeeded(on_engine(run("cpu", model, greedy(n), 0), environment=HIDDEN))
    # a model without load parameters has the stock graph
    stock = on_gpu(device_run("stock", model, [], greedy(n), None))
    expected = cpu.ops("cpu", "greedy")[0]["tokens"]
    assert stock.ops("stock", "greedy")[0]["tokens"] == expected
    logits, on_device = cpu.arrays["cpu/last"], stock.arrays["stock/last"]
    return expected, logits, on_device, max(1e-4, 1.5 * float(np.abs(on_device - logits).max()))


def assert_as_reference(outcome: engine_libs.Outcome, name: str, model: str | Path, n: int = N_STEPS) -> None:
    expected, on_cpu, on_device, tolerance = references(model, n)
    for result in outcome.ops(name, "greedy"):
        assert result["tokens"] == expected, name
    for logits in (on_cpu, on_device):
        np.testing.assert_allclose(
            outcome.arrays[f"{name}/last"], logits, rtol=0, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("model", MODELS)
def test_every_miss_policy_generates_what_the_cpu_does(model: str) -> None:
    """Two tiers and three, a budget that evicts; evicted slots are poisoned, uploads late."""
    runs = [
        device_run(f"{miss} {host}", model, [], [
            {"op": "device_start", "budget": 0.55, "miss": miss, "poison": 2}, {"op": "reset_counters"},
            *greedy(), {"op": "device_counters"}, {"op": "counters"}, {"op": "device_info"},
            {"op": "device_residency", "save": "residency"},
        ], host)
        for miss in (FETCH, CPU, AUTO) for host in (0, "40%")
    ]  # fmt: skip
    outcome = on_gpu(*runs)
    tiny = tiny_models.MODELS[model]
    for spec in runs:
        name = spec["name"]
        assert_as_reference(outcome, name, model)
        device, host = outcome.ops(name, "device_counters")[0], outcome.ops(name, "counters")[0]
        info = outcome.ops(name, "device_info")[0]["devices"][0]
        assert info["is_gpu"]
        # the prompt passes the cache by, but for a last layer that computes one token
        routed = device["n_hits"] + device["n_misses"]
        assert routed - N_STEPS * tiny.n_layer_moe * tiny.top_k in (0, tiny.top_k)
        assert device["n_fetched"] + device["n_cpu"] == device["n_misses"]
        assert host["n_hits"] + host["n_misses"] >= device["n_misses"]
        n_uploads = device["n_fetched"] + device["n_admitted"]
        assert n_uploads - device["n_evictions"] == outcome.ops(name, "device_residency")[0]["n_resident"]
        assert device["n_hits"] > 0
        assert device["n_evictions"] > 0
        assert device["resident_bytes"] <= info["pool_bytes"] <= 0.55 * info["expert_bytes"] + 4096


@pytest.mark.parametrize("model", ["qwen3moe", "gpt-oss"])
def test_placements(model: str) -> None:
    """Whole layers and the cache in turn; all experts; masks on whole layers, which then have a route op."""
    little = [
        {"op": "set_k", "k": 2}, {"op": "clear"}, {"op": "decode", "tokens": PROMPT[:8], "save": "little"},
    ]  # fmt: skip
    runs = [
        device_run(f"{budget}", model, [], [
            {"op": "device_start", "budget": budget, "miss": CPU, "placement": LAYERS, "poison": 1},
            *greedy(),
            {"op": "device_placement", "placement": CACHE}, *greedy(),
            {"op": "device_placement", "placement": LAYERS}, *greedy(), *little,
        ], "40%")
        for budget in (0.6, 1.0)
    ]  # fmt: skip
    outcome = on_gpu(*runs)
    expected = succeeded(on_engine(run("r", model, little, 0), environment=HIDDEN)).arrays["r/little"]
    for spec in runs:
        assert_as_reference(outcome, spec["name"], model)
        np.testing.assert_allclose(
            outcome.arrays[f"{spec['name']}/little"], expected, rtol=0, atol=10 * references(model)[3]
        )


def test_batches_use_the_cache() -> None:
    """Drafts take a device's other kernels, and more slots than a token: one batch of each kind."""
    model, following = "qwen3moe", tokens(60, 32)
    ops: list[dict[str, Any]] = [{"op": "decode", "tokens": PROMPT}]
    pos = len(PROMPT)
    for i, batch in enumerate((following[:5], following[5:14], following[14:46])):
        ops.append({"op": "decode", "tokens": batch, "pos": pos, "save": f"batch-{i}"})
        pos += len(batch)
    start = {"op": "device_start", "budget": 0.55, "miss": FETCH, "poison": 1}
    outcome = on_gpu(device_run("d", model, [], [start, *ops, {"op": "device_counters"}], "40%"))
    expected = succeeded(on_engine(run("r", model, ops, 0), environment=HIDDEN))
    for i in range(3):
        np.testing.assert_allclose(
            outcome.arrays[f"d/batch-{i}"], expected.arrays[f"r/batch-{i}"], rtol=0, atol=0.05
        )
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
    outcome = on_gpu(device_run("d", path, [], [start, *greedy(8), {"op": "device_info"}]))
    assert_as_reference(outcome, "d", path, 8)
    # all experts are there, a layer each
    assert outcome.ops("d", "device_info")[0]["devices"][0]["n_slots"] >= 4 * 16


def test_a_pool_that_kernels_do_not_reach_is_divided() -> None:
    """200 MB of experts in tensors of at most 24 MiB, as a driver with small buffers would have it."""
    if not gpu()[0].startswith("Vulkan"):
        pytest.skip("no GPU of ggml's Vulkan backend, which alone has a variable that limits buffers")
    start = {"op": "device_start", "budget": 1.0, "miss": FETCH}
    ops = [start, *greedy(8), {"op": "device_info"}]
    job = device_run("d", "bulky", [], ops, n_ctx=128, n_ubatch=64)
    limit = str(24 << 20)
    outcome = on_gpu(job, GGML_VK_FORCE_MAX_BUFFER_SIZE=limit, GGML_VK_SUBALLOCATION_BLOCK_SIZE=limit)
    expected = succeeded(on_engine(run("r", "bulky", greedy(8), 0, n_ctx=128), environment=HIDDEN))
    assert outcome.ops("d", "greedy")[0]["tokens"] == expected.ops("r", "greedy")[0]["tokens"]
    info = outcome.ops("d", "device_info")[0]["devices"][0]
    assert info["n_slots"] == 8 * 32
