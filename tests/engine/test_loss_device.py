"""The ladder of lossy rules with experts in a device's slots: an RPC server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_jobs import AUTO, CPU, FETCH, LAYERS, device_run, on_devices, rpc_servers, until
from device_oracle import assert_close
from engine_jobs import on_engine, run, succeeded, tokens
from loss_jobs import RULES, scripted, set_up

TEXT = tokens(14, 6)
STEPS = {"op": "steps", "tokens": TEXT, "pos": 0}
# a rule that looks at weights alone, and those that read scores, which are made on the device
CHECKED = ("drop", "little-on-miss", "buddy", "live", "prior")


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with rpc_servers() as endpoints:
        yield endpoints


def under_rules(start: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every rule over the same text, from nothing each time, for a scripted set of residents."""
    ops = [start] if start is not None else []
    for rule in CHECKED:
        ops += [
            {"op": "loss", "rules": None, "lossy": False}, {"op": "clear"},
            {"op": "decode", "tokens": tokens(12, 5)}, {"op": "clear"}, {"op": "reset_counters"},
            {"op": "loss", "rules": RULES[rule]}, {**STEPS, "save": rule}, {"op": "loss_counters"},
        ]  # fmt: skip
    return ops


@pytest.mark.parametrize("model", ["qwen3moe", "olmoe"])
def test_rules_compute_on_a_device_what_they_do_on_the_host(model: str, rpc: list[str]) -> None:
    """Every miss policy; some of what is dropped or stands in lies in slots, some does not."""
    host = succeeded(on_engine(run("host", model, [*set_up(model), *under_rules()], 0)))
    runs = [
        device_run(f"{miss}", model, rpc, [
            *set_up(model), *under_rules({"op": "device_start", "budget": 0.5, "miss": miss, "poison": 1}),
            until([{"op": "clear"}, STEPS], n_hits=0),
        ], 0)
        for miss in (AUTO, FETCH, CPU)
    ]  # fmt: skip
    outcome = succeeded(on_devices(*runs))
    for each in runs:
        name = each["name"]
        for i, rule in enumerate(CHECKED):
            assert_close(
                outcome.arrays[f"{name}/{rule}"], host.arrays[f"host/{rule}"], f"{rule}, miss {name}"
            )
            there, here = outcome.ops(name, "loss_counters")[i], host.ops("host", "loss_counters")[i]
            kinds = ("n_dropped", "n_left_out", "n_substituted")
            assert [there[kind] for kind in kinds] == pytest.approx([here[kind] for kind in kinds], abs=3)


def test_missing_is_what_would_have_to_be_moved(rpc: list[str]) -> None:
    """With all experts in host memory only a device that fetches its misses has missing ones."""
    model = "olmoe"

    def on_device(name: str, rules: dict[str, Any] | None, **how: Any) -> dict[str, Any]:
        return device_run(name, model, rpc, [
            {"op": "device_start", "budget": 0.5, **how}, {"op": "loss", "rules": rules},
            {**STEPS, "save": "rows"}, {"op": "loss_counters"}, {"op": "device_counters"},
        ], 0)  # fmt: skip

    outcome = succeeded(on_devices(
        on_device("exact", None, miss=FETCH), on_device("fetch", {"drop": 1.5}, miss=FETCH),
        on_device("cpu", {"drop": 1.5}, miss=CPU), on_device("whole", {"drop": 1.5}, placement=LAYERS),
    ))  # fmt: skip
    loss = {name: outcome.ops(name, "loss_counters")[0] for name in ("fetch", "cpu", "whole")}
    uploads = {name: outcome.ops(name, "device_counters")[0]["bytes_uploaded"] for name in ("exact", "fetch")}
    assert loss["fetch"]["n_dropped"] > 0
    assert uploads["fetch"] < uploads["exact"]
    assert loss["cpu"]["n_missing"] == 0
    # the layers that fit have nothing missing, and neither have those in host memory
    assert loss["whole"]["n_missing"] == 0
    assert_close(outcome.arrays["cpu/rows"], outcome.arrays["exact/rows"], "nothing was missing")
    assert np.abs(outcome.arrays["fetch/rows"] - outcome.arrays["exact/rows"]).max() > 0.01


def test_the_script_leaves_some_of_each_layer_out() -> None:
    """Or the comparison above would compare nothing."""
    for model in ("qwen3moe", "olmoe"):
        assert all(0 < sum(row) < len(row) for row in scripted(model)["resident"])
