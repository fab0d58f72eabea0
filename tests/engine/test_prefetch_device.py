"""Uploads ahead of need: they change when bytes move to a device's slots, never what is computed.

The device is an RPC server on loopback; evicted slots are poisoned, and uploads then count as free, so that
every hint is taken that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models
from device_jobs import AUTO as MISS_AUTO
from device_jobs import (
    CPU,
    FETCH,
    HOST,
    LAYERS,
    device_run,
    rpc_servers,
    succeeded_on_devices,
    until,
)
from device_oracle import assert_as_on_cpu, expert_bytes, follow
from engine_jobs import assert_same_bits, tokens

from mobile_gguf.engine.structs import Counters, DeviceCounters, PrefetchCounters
from mobile_gguf.generate.answer.answer import read_traffic

OFF, ON, AUTO = range(3)
BY_TRANSITIONS = 2
MODEL = "qwen3moe"
PROMPT, FOLLOWING = tokens(40, 31), tokens(24, 32)


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with rpc_servers() as endpoints:
        yield endpoints


def start(miss: int, budget: float = 0.6, **how: Any) -> dict[str, Any]:
    return {"op": "device_start", "budget": budget, "miss": miss, "poison": 1, **how}


def prefetch(mode: int, predictor: int = 0) -> dict[str, Any]:
    return {"op": "set_prefetch", "mode": mode, "predictor": predictor}


def counted(save: str = "residency") -> list[dict[str, Any]]:
    # the residency collects what is done
    return [{"op": "device_residency", "save": save}, {"op": "device_counters"}, {"op": "prefetch_counters"}]


def assert_adds_up(outcome: Any, name: str, model: str, at: int = -1) -> dict[str, int]:
    device = outcome.ops(name, "device_counters")[at]
    n_resident = outcome.ops(name, "device_residency")[at]["n_resident"]
    smallest, largest = expert_bytes(model)
    n_uploads = device["n_fetched"] + device["n_admitted"] + device["n_ahead"]
    assert device["n_ahead"] == sum(device[f"n_ahead_{end}"] for end in ("used", "wasted", "unused")), name
    # an expert that is uploaded twice while it is there takes two slots, and one of them is lost
    assert n_uploads - device["n_evictions"] == n_resident, name
    assert n_uploads * smallest <= device["bytes_uploaded"] <= n_uploads * largest, name
    assert device["n_ahead"] * smallest <= device["bytes_uploaded_ahead"] <= device["n_ahead"] * largest
    assert n_resident * smallest <= device["resident_bytes"] <= n_resident * largest
    assert device["n_misses"] == device["n_fetched"] + device["n_cpu"]
    assert device["n_ahead_unused"] <= n_resident
    assert device["n_ahead_wasted"] <= device["n_wasted"]
    assert (device["bytes_ahead_wasted"] > 0) == (device["n_ahead_wasted"] > 0)
    return device


# results


@pytest.mark.parametrize("model", ["qwen3moe", "gpt-oss", "deepseek3", "qwen3moe-q4_k"])
def test_uploads_ahead_change_no_results(model: str, rpc: list[str]) -> None:
    """Every miss policy, two and three tiers, by router and by transitions; the oracle is the CPU alone.

    Most uploads ahead come while slots are free, so each round begins anew.
    """

    def ops(miss: int, predictor: int) -> list[dict[str, Any]]:
        anew = [start(miss), prefetch(ON, predictor), *follow()]
        above = {"n_ahead_used": 0} | ({"ahead_saved_us": 0} if miss == CPU else {})
        return [*anew, until([{"op": "device_stop"}, *anew], **above), *counted()]

    runs = [
        device_run(f"{miss} {host} {predictor}", model, rpc, ops(miss, predictor), host)
        for miss in (FETCH, CPU, MISS_AUTO) for host in (0, "40%") for predictor in (0, BY_TRANSITIONS)
    ]  # fmt: skip
    outcome = succeeded_on_devices(*runs)
    for run in runs:
        assert_as_on_cpu(outcome, run["name"], model)
        if run["name"].startswith(str(FETCH)):  # all on the device: its own bits, whenever experts come
            ours, first = (outcome.arrays[f"{name}/rows"] for name in (run["name"], runs[0]["name"]))
            assert_same_bits(ours, first, run["name"])
        assert_adds_up(outcome, run["name"], model)


@pytest.mark.parametrize("host", [0, "40%"])
def test_fetch_computes_the_same_bits_whenever_experts_come(host: int | str, rpc: list[str]) -> None:
    """Everything is computed on the device, in the same order of ranks: a late upload is waited for.

    What comes ahead is no miss: with empty slots at first, fewer than without hints.
    """
    budgets = ("0.3", "0.6", "1.0")
    pairs = [
        {"op": "decode", "tokens": tokens(2, i), "pos": 64 + 2 * i, "save": f"pair-{i}"} for i in range(8)
    ]

    def anew(mode: int, budget: str) -> list[dict[str, Any]]:
        return [
            start(FETCH, float(budget)), prefetch(mode), {"op": "clear"}, {"op": "decode", "tokens": PROMPT},
            {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT), "save": "steps"},
        ]  # fmt: skip

    off = succeeded_on_devices(*(
        device_run(budget, MODEL, rpc, [*anew(OFF, budget), *counted(), *pairs], host) for budget in budgets
    ))  # fmt: skip
    n_hits = {budget: assert_adds_up(off, budget, MODEL)["n_hits"] for budget in budgets}
    on = succeeded_on_devices(*(
        device_run(budget, MODEL, rpc, [
            *anew(ON, budget),
            until([{"op": "device_stop"}, *anew(ON, budget)], n_ahead=0, n_hits=n_hits[budget]),
            *counted(), *pairs,
        ], host)
        for budget in budgets
    ))  # fmt: skip
    for budget in budgets:
        for name in ("steps", *(f"pair-{i}" for i in range(8))):
            ours, plain = (outcome.arrays[f"{budget}/{name}"] for outcome in (on, off))
            assert_same_bits(ours, plain, f"{budget} {name}")
        assert assert_adds_up(on, budget, MODEL)["n_cpu"] == 0
        plain_counted = off.ops(budget, "device_counters")[0]
        assert plain_counted["n_cpu"] == plain_counted["n_ahead"] == 0


def test_nothing_without_a_place_or_a_reason(rpc: list[str]) -> None:
    runs = {
        "off": [start(CPU), prefetch(OFF)],
        "no uploader": [start(CPU, n_uploads=0), prefetch(ON)],
        "layers": [start(CPU, placement=LAYERS), prefetch(ON)],
        "host": [start(CPU, placement=HOST), prefetch(ON)],
        "a token's slots": [start(FETCH, 2 * tiny_models.MODELS[MODEL].top_k / 64), prefetch(ON)],
    }  # fmt: skip
    outcome = succeeded_on_devices(
        *(device_run(name, MODEL, rpc, [*ops, *follow(16), *counted()]) for name, ops in runs.items())
    )
    for name in runs:
        device = outcome.ops(name, "device_counters")[0]
        assert device["n_ahead"] == device["bytes_uploaded_ahead"] == 0, name
        ahead = outcome.ops(name, "prefetch_counters")[0]
        assert ahead["next_on"] == ahead["masked_on"] == (name == "a token's slots"), name


# hints


def test_what_a_little_pass_left_out_is_uploaded_for_the_big_one(rpc: list[str]) -> None:
    """All of it at once if there is room; the first layer needs exactly what the little pass left out."""
    spec = tiny_models.MODELS[MODEL]
    n_masked = spec.top_k - spec.little_k
    n_experts = spec.n_layer_moe * spec.n_expert
    few = 2 * spec.top_k + 2  # slots, of which a token's stay zero: two more than a layer needs
    # uploads in flight, slots, uploads before the big pass begins
    variants = {
        "all": (64, n_experts, spec.n_layer_moe * n_masked),
        "some": (3, n_experts, 3),
        "one": (1, n_experts, 1),
        "few slots": (64, few, 2),
    }

    def again(i: int) -> list[dict[str, Any]]:
        one = {"op": "steps", "tokens": FOLLOWING[i : i + 1], "pos": len(PROMPT) + i}
        return [
            {"op": "set_k", "k": spec.little_k}, one, {"op": "device_counters"},
            prefetch(ON), {"op": "prefetch"}, {"op": "device_counters"},
            {"op": "remove", "pos": len(PROMPT) + i}, {"op": "set_k", "k": 0}, one | {"save": f"big-{i}"},
            *counted(),
        ]  # fmt: skip

    outcome = succeeded_on_devices(*(
        device_run(name, MODEL, rpc, [
            start(FETCH, n_slots / n_experts, n_uploads=n_uploads), {"op": "decode", "tokens": PROMPT},
            *(op for i in range(8) for op in again(i)),
        ])
        for name, (n_uploads, n_slots, _) in variants.items()
    ))  # fmt: skip
    for name, (_, _, at_once) in variants.items():
        before, hinted, after = outcome.ops(name, "device_counters")[:3]
        assert before["n_ahead"] == 0, name
        assert hinted["n_ahead"] == at_once, name
        assert hinted["n_ahead_used"] == 0, name
        assert after["n_ahead_used"] >= min(n_masked, at_once), name
        assert assert_adds_up(outcome, name, MODEL)["n_cpu"] == 0, name
        for i in range(8):
            assert_same_bits(outcome.arrays[f"{name}/big-{i}"], outcome.arrays[f"all/big-{i}"], name)


def test_wrong_hints_are_wasted_and_right_ones_used(rpc: list[str]) -> None:
    """A replay in which every layer's experts follow from those of the layer before, then from none.

    Of each what a first time teaches does not count.
    """
    spec = tiny_models.MODELS[MODEL]
    k, n_layer = spec.top_k, spec.config["num_hidden_layers"]

    def step(first: int, stride: int) -> list[list[int]]:
        return [[(first + layer * stride + i) % spec.n_expert for i in range(k)] for layer in range(n_layer)]

    learnt = [step(first, k) for first in range(0, spec.n_expert, k)] * 16
    rng = np.random.default_rng(5)
    chaos = [[rng.permutation(spec.n_expert)[:k].tolist() for _ in range(n_layer)] for _ in range(32)]
    ops: list[dict[str, Any]] = [
        start(FETCH, 0.45), prefetch(ON), {"op": "decode", "tokens": PROMPT[:1]},
    ]  # fmt: skip
    pos = 1
    for ids, enough in ((learnt, "n_ahead_used"), (chaos, "n_ahead_wasted")):
        n = len(ids)
        turned = [ids[(i - pos) % n] for i in range(n)]  # step p of a replay is that of position p
        steps = {"op": "steps", "tokens": tokens(n, pos), "pos": pos}
        ops += [
            {"op": "replay", "ids": turned}, steps, {"op": "reset_counters"},
            until([{"op": "remove", "pos": pos}, steps], **{enough: 200}), *counted(),
        ]  # fmt: skip
        pos += n
    outcome = succeeded_on_devices(device_run("r", MODEL, rpc, ops))
    right, wrong = outcome.ops("r", "device_counters")
    assert right["n_ahead_used"] > 2 * right["n_ahead_wasted"]
    assert wrong["n_ahead_wasted"] > wrong["n_ahead"] / 8
    assert (
        wrong["n_ahead_wasted"] * right["n_ahead"] > right["n_ahead_wasted"] * wrong["n_ahead"]
    )  # the shares
    for at in (right, wrong):
        assert at["n_misses"] == at["n_fetched"]


# auto


def test_auto_measures_uploads(rpc: list[str]) -> None:
    """Whether or not experts are missed in host memory: it begins with the first pass."""
    steps = {"op": "steps", "tokens": tokens(20, 33), "pos": len(PROMPT)}
    again = [prefetch(OFF), prefetch(AUTO), {"op": "remove", "pos": len(PROMPT)}, steps]
    outcome = succeeded_on_devices(*(
        device_run(str(host), MODEL, rpc, [
            start(CPU), {"op": "decode", "tokens": PROMPT}, prefetch(AUTO), {"op": "reset_counters"},
            steps, *counted(), until(again, n_ahead=0),
        ], host)
        for host in (0, "40%")
    ))  # fmt: skip
    for name in ("0", "40%"):
        ahead = outcome.ops(name, "prefetch_counters")[0]
        assert ahead["n_passes_on"] == 10  # of a round of 20
        assert ahead["next_permille"] > 0
        assert ahead["n_queued"] == 0


# receipts


def test_a_receipt_has_reads_and_uploads() -> None:
    from fake_backend import FakeBackend

    traffic = read_traffic(
        FakeBackend(), Counters(),
        DeviceCounters(n_ahead_used=2, bytes_ahead_wasted=30, ahead_saved_us=400),
        PrefetchCounters(n_used=1, bytes_wasted=3, saved_us=1100),
    )  # fmt: skip
    assert traffic["prefetch_hits"] == 3
    assert traffic["prefetch_wasted_bytes"] == 33
    assert traffic["prefetch_saved_ms"] == 1.5
