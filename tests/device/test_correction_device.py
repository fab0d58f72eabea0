"""Corrections of little tokens with experts in a device's slots: an RPC server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models
from device_jobs import AUTO, CACHE, CPU, FETCH, LAYERS, device_run, on_devices, rpc_servers
from device_oracle import assert_close
from engine_jobs import on_engine, run, succeeded, tokens

TEXT = tokens(24, 6)


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with rpc_servers() as endpoints:
        yield endpoints


def ops(model: str, save: str) -> list[dict[str, Any]]:
    """A correction, and passes of a token with all experts, half, one less than that, and half again."""
    spec = tiny_models.MODELS[model]
    half = spec.little_k
    counts = [(0, half, half - 1, half)[i % 4] for i in range(len(TEXT))]
    shape = spec.config["num_hidden_layers"], spec.config["hidden_size"]
    rng = np.random.default_rng(7)
    scale, shift = rng.normal(1, 0.3, shape), rng.normal(0, 0.2, shape)
    correction = {"op": "correction", "k": half, "scale": scale.tolist(), "shift": shift.tolist()}
    steps = [
        op
        for i, (token, k) in enumerate(zip(TEXT, counts, strict=True))
        for op in (
            {"op": "set_k", "k": k}, {"op": "steps", "tokens": [token], "pos": i, "save": f"{save}/{i}"},
        )
    ]  # fmt: skip
    return [correction, {"op": "clear"}, *steps]


@pytest.mark.parametrize("model", ["qwen3moe", "olmoe"])
def test_a_device_gives_what_the_host_does(model: str, rpc: list[str]) -> None:
    """Slots with every miss policy, and layers as a whole; uncorrected it would be further off."""
    host = succeeded(on_engine(run("host", model, ops(model, "rows"), 0)))
    plain = succeeded(on_engine(run("plain", model, [*ops(model, "rows")[1:]], 0)))
    expected, uncorrected = (
        np.concatenate([outcome.arrays[f"{name}/rows/{i}"] for i in range(len(TEXT))])
        for name, outcome in (("host", host), ("plain", plain))
    )
    assert np.abs(expected - uncorrected).max() > 1
    starts = {
        **{str(miss): {"miss": miss} for miss in (AUTO, FETCH, CPU)},
        "layers": {"placement": LAYERS}, "cache": {"placement": CACHE},
    }  # fmt: skip
    runs = [
        device_run(name, model, rpc, [
            {"op": "device_start", "budget": 0.5, "poison": 1, **start}, *ops(model, "rows"),
            {"op": "device_counters"},
        ], 0)
        for name, start in starts.items()
    ]  # fmt: skip
    outcome = succeeded(on_devices(*runs))
    for name in starts:
        rows = np.concatenate([outcome.arrays[f"{name}/rows/{i}"] for i in range(len(TEXT))])
        assert_close(rows, expected, name)
        assert outcome.ops(name, "device_counters")[0]["n_hits"] > 0
