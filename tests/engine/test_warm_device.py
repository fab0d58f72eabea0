"""The warm set of a model on a device: it fills the host, and the device takes from there what it needs."""

from __future__ import annotations

from pathlib import Path

import layout_files
import numpy as np
import pytest
import tiny_models
from device_jobs import FETCH, device_run, rpc_servers, succeeded_on_devices
from device_oracle import assert_as_on_cpu, follow

RESIDENT = 2  # enum mobile_residency
NAMED = [[1, 6], [0, 1], [0, 7], [1, 0]]
N_STEPS = 16


@pytest.mark.parametrize("kind", ["mixtral", "segments"])
def test_named_experts_fill_the_host(kind: str, tmp_path: Path) -> None:
    """Over an RPC server; the results are those of the CPU, and nothing of it is on the device by itself."""
    model = tiny_models.path("mixtral")
    if kind == "segments":
        model = layout_files.write_per_expert(model, tmp_path / "m.gguf", 4)
    start = {"op": "device_start", "budget": 0.5, "miss": FETCH, "poison": 1}
    named = {"op": "warm", "experts": NAMED, "wait": True}
    places = [{"op": "residency", "save": "host"}, {"op": "device_residency", "save": "device"}]
    with rpc_servers() as rpc:
        outcome = succeeded_on_devices(
            device_run(
                "r", model, rpc, [start, named, *places, *follow(N_STEPS), {"op": "warm_counters"}], "70%"
            )
        )
    assert sorted(np.argwhere(outcome.arrays["r/host"] == RESIDENT).tolist()) == sorted(NAMED)
    assert not outcome.arrays["r/device"].any()
    assert_as_on_cpu(outcome, "r", model, N_STEPS)
    assert outcome.ops("r", "warm_counters")[0]["n_used"] > 0
