"""Counters, residency map and trace agree with each other, and a replayed trace gives the same logits."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, read_trace, run, succeeded, tokens

RESIDENT = 2  # enum mobile_residency
PROMPT = tokens(20, 21)
FOLLOWING = tokens(24, 22)
MODELS = ["mixtral", "deepseek3", "qwen3moe-q4_k", "granitemoe-swa", "mixtral-split", "nemotron-h"]


def start(save: str = "prompt") -> list[dict[str, Any]]:
    return [{"op": "clear"}, {"op": "decode", "tokens": PROMPT, "save": save}]


def expert_tensors(model: str) -> dict[int, list[Any]]:
    """The routed experts' weight tensors of a model by layer, as the gguf package sees them."""
    by_layer: dict[int, list[Any]] = defaultdict(list)
    for part in sorted(tiny_models.path(model).parent.glob("*.gguf")):
        for tensor in gguf.GGUFReader(part).tensors:
            if tensor.name.endswith("_exps.weight"):
                by_layer[int(tensor.name.split(".")[1])].append(tensor)
    return by_layer


@pytest.mark.parametrize("model", MODELS)
def test_model_info_agrees_with_the_file(model: str) -> None:
    spec, tensors = tiny_models.MODELS[model], expert_tensors(model)
    info = succeeded(on_engine(run("r", model, [], "min"))).runs["r"]["info"]
    sizes = {layer: sum(int(t.n_bytes) for t in of_layer) for layer, of_layer in tensors.items()}
    assert info["expert_bytes"] == sum(sizes.values())
    assert info["n_layer"] == spec.config["num_hidden_layers"]
    assert info["n_layer_moe"] == len(sizes) == spec.n_layer_moe
    assert info["n_expert"] == spec.n_expert
    assert info["n_expert_used"] == spec.top_k
    # alignment may cost two blocks a tensor and expert, no more
    room = 2 * 4096 * 3 * spec.n_expert
    assert max(sizes.values()) <= info["budget_min_bytes"] <= max(sizes.values()) + room
    assert info["expert_bytes"] <= info["budget_all_bytes"] <= info["expert_bytes"] + room * len(sizes)
    assert info["budget_bytes"] == info["budget_min_bytes"]


@pytest.mark.parametrize("budget", ["min", "40%", "70%"])
@pytest.mark.parametrize("model", MODELS)
def test_counters_agree_with_the_trace(model: str, budget: str, tmp_path: Path) -> None:
    spec, path = tiny_models.MODELS[model], tmp_path / "trace.csv"
    outcome = succeeded(on_engine(run("r", model, [
        *start(), {"op": "trace_start", "path": str(path)}, {"op": "reset_counters"}, {"op": "counters"},
        {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT)},
        {"op": "counters"}, {"op": "trace_stop"}, {"op": "residency", "save": "residency"},
    ], budget)))  # fmt: skip
    zero, after = outcome.ops("r", "counters")
    assert all(zero[name] == 0 for name in ("n_tokens", "n_hits", "n_misses", "bytes_read", "stall_us"))
    rows = read_trace(path)
    info = outcome.runs["r"]["info"]
    layers = sorted(expert_tensors(model))
    # every token routes to top-k distinct experts of every MoE layer
    routed = defaultdict(list)
    for row in rows:
        assert row["phase"] == 1
        routed[row["step"], row["layer"]].append(row["expert"])
    assert len(routed) == len(FOLLOWING) * len(layers)
    assert all(len(set(experts)) == spec.top_k for experts in routed.values())
    assert sorted({row["layer"] for row in rows}) == layers
    # and each is a hit or a miss, which is where bytes come from
    assert after["n_tokens"] == len(FOLLOWING)
    assert after["n_hits"] + after["n_misses"] == len(rows)
    assert after["n_misses"] == sum(row["residency"] == 0 for row in rows)
    of_layer = {
        layer: sum(int(t.n_bytes) // spec.n_expert for t in tensors)
        for layer, tensors in expert_tensors(model).items()
    }
    assert after["bytes_routed"] == sum(of_layer[int(row["layer"])] for row in rows)
    missed = sum(of_layer[int(row["layer"])] for row in rows if row["residency"] == 0)
    assert missed <= after["bytes_read_demand"] <= missed + after["n_misses"] * 2 * 4096 * 3
    assert after["bytes_read"] >= after["bytes_read_demand"]
    assert after["resident_bytes"] <= after["resident_bytes_peak"] <= info["budget_bytes"]
    # the map counts what the bytes say, and what the last token used is there
    residency = outcome.arrays["r/residency"]
    assert residency.shape == (info["n_layer"], info["n_expert"])
    held = sum(int((residency[layer] == RESIDENT).sum()) * of_layer[layer] for layer in layers)
    assert 0 < held <= after["resident_bytes"]
    dense = [layer for layer in range(info["n_layer"]) if layer not in layers]
    assert not residency[dense].any()
    last = [(int(row["layer"]), int(row["expert"])) for row in rows if row["step"] == rows[-1]["step"]]
    # the last layer's experts cannot have been evicted by anything
    assert all(residency[layer, expert] == RESIDENT for layer, expert in last if layer == layers[-1])


def test_batch_counts_distinct_experts(tmp_path: Path) -> None:
    """A batch needs an expert once, however many of its tokens route to it."""
    path = tmp_path / "trace.csv"
    outcome = succeeded(on_engine(run("r", "qwen2moe", [
        {"op": "trace_start", "path": str(path)}, {"op": "reset_counters"}, *start(),
        {"op": "counters"}, {"op": "trace_stop"},
    ], "40%")))  # fmt: skip
    rows = read_trace(path)
    assert {row["phase"] for row in rows} == {0.0}
    assert len(rows) == len(PROMPT) * 4 * tiny_models.MODELS["qwen2moe"].top_k
    distinct = {(row["layer"], row["expert"]) for row in rows}
    counters = outcome.ops("r", "counters")[0]
    assert counters["n_hits"] + counters["n_misses"] == len(distinct)


def test_little_halves_what_is_routed() -> None:
    spec = tiny_models.MODELS["olmoe"]
    outcome = succeeded(on_engine(run("r", "olmoe", [
        *start(), {"op": "set_k", "k": spec.little_k}, {"op": "reset_counters"},
        {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT)}, {"op": "counters"},
    ], "40%")))  # fmt: skip
    counters = outcome.ops("r", "counters")[0]
    assert counters["n_hits"] + counters["n_misses"] == len(FOLLOWING) * 4 * spec.little_k
    assert counters["n_tokens_little"] == len(FOLLOWING)


@pytest.mark.parametrize("budget", [0, 1 << 60], ids=["plain buffers", "slots"])
def test_all_experts_resident_with_room_for_all(budget: int) -> None:
    outcome = succeeded(on_engine(run("r", "deepseek3", [
        *start(), {"op": "counters"}, {"op": "residency", "save": "residency"},
    ], budget)))  # fmt: skip
    info, counters = outcome.runs["r"]["info"], outcome.ops("r", "counters")[0]
    assert counters["n_misses"] == counters["n_evictions"] == counters["bytes_read"] == 0
    assert counters["resident_bytes"] == info["budget_all_bytes" if budget else "expert_bytes"]
    residency = outcome.arrays["r/residency"]
    assert not residency[0].any(), "layer 0 is dense"
    assert (residency[1:] == RESIDENT).all()


def replay_ids(rows: list[dict[str, float]], n_steps: int, n_layer: int, k: int) -> np.ndarray:
    """The traced expert ids as mobile_set_replay takes them; int32 [n_steps, n_layer, k]."""
    ids = np.zeros((n_steps, n_layer, k), np.int32)
    first = rows[0]["step"]
    for row in rows:
        ids[int(row["step"] - first), int(row["layer"]), int(row["slot"])] = int(row["expert"])
    return ids


@pytest.mark.parametrize("model", MODELS)
def test_replaying_a_trace_gives_the_same_logits(model: str, tmp_path: Path) -> None:
    spec, path = tiny_models.MODELS[model], tmp_path / "trace.csv"
    recorded = succeeded(on_engine(run("r", model, [
        {"op": "trace_start", "path": str(path)},
        {"op": "steps", "tokens": FOLLOWING, "pos": 0, "save": "logits"}, {"op": "trace_stop"},
    ], "40%")))  # fmt: skip
    n_layer = recorded.runs["r"]["info"]["n_layer"]
    ids = replay_ids(read_trace(path), len(FOLLOWING), n_layer, spec.top_k)
    other = (ids + 1) % spec.n_expert
    again = tmp_path / "again.csv"
    replayed = succeeded(on_engine(run("r", model, [
        {"op": "replay", "ids": ids.tolist()}, {"op": "trace_start", "path": str(again)},
        {"op": "steps", "tokens": FOLLOWING, "pos": 0, "save": "same"}, {"op": "trace_stop"},
        {"op": "clear"}, {"op": "replay", "ids": other.tolist()},
        {"op": "steps", "tokens": FOLLOWING, "pos": 0, "save": "other"},
        {"op": "clear"}, {"op": "replay", "ids": None},
        {"op": "steps", "tokens": FOLLOWING, "pos": 0, "save": "without"},
    ], "min")))  # fmt: skip
    arrays = replayed.arrays
    assert_same_bits(arrays["r/same"], recorded.arrays["r/logits"], "replay of its own trace")
    assert_same_bits(arrays["r/without"], recorded.arrays["r/logits"], "after the replay ended")
    assert np.abs(arrays["r/other"] - arrays["r/same"]).max() > 0.01, "other experts gave the same logits"
    assert (replay_ids(read_trace(again), len(FOLLOWING), n_layer, spec.top_k) == ids).all()


def test_eviction_policies_differ_in_misses_only(tmp_path: Path) -> None:
    """Both policies compute the same, though not with the same misses: the setting is not ignored."""
    runs = [
        run(f"{eviction}", "deepseek3", [
            *start(), {"op": "reset_counters"},
            {"op": "steps", "tokens": FOLLOWING * 8, "pos": len(PROMPT), "save": "steps"}, {"op": "counters"},
        ], "40%", mobile={"eviction": eviction})
        for eviction in (0, 1)
    ]  # fmt: skip
    outcome = succeeded(on_engine(*runs))
    assert_same_bits(outcome.arrays["1/steps"], outcome.arrays["0/steps"], "moepic against lru")
    lru, moepic = (outcome.ops(f"{eviction}", "counters")[0] for eviction in (0, 1))
    assert lru["n_hits"] + lru["n_misses"] == moepic["n_hits"] + moepic["n_misses"]
    assert lru["n_misses"] != moepic["n_misses"]


@pytest.mark.parametrize("eviction", [0, 1, 2], ids=["lru", "moepic", "decay"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_misses_equal_a_simulation(eviction: int, at_once: int, tmp_path: Path) -> None:
    """The oracle is a plain cache over the traced ids (all experts of this model have one size)."""
    path, text = tmp_path / "trace.csv", tokens(120, 31)
    passes = [
        {
            "op": "decode",
            "tokens": text[i : i + at_once],
            "pos": [i // at_once] * at_once,
            "seqs": list(range(at_once)),
        }
        for i in range(0, len(text), at_once)
    ]
    outcome = succeeded(on_engine(run("r", "qwen2moe", [
        {"op": "trace_start", "path": str(path)}, *passes, {"op": "counters"}, {"op": "trace_stop"},
    ], "40%", mobile={"eviction": eviction}, n_seq_max=at_once, kv_unified=True)))  # fmt: skip
    info, counters = outcome.runs["r"]["info"], outcome.ops("r", "counters")[0]
    n_slots = info["budget_bytes"] * info["n_layer_moe"] * info["n_expert"] // info["budget_all_bytes"]
    by_pass: dict[tuple[float, float], list[tuple[int, int]]] = defaultdict(list)
    at: dict[tuple[float, float], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in read_trace(path):
        place, expert = (row["step"] // at_once, row["layer"]), (int(row["layer"]), int(row["expert"]))
        by_pass[place].append(expert)
        at[place][expert] = max(row["step"], at[place].get(expert, 0.0))
    # MoEpic's rho is 0.25; its omega 128 tokens, decay's 12 visits of the expert's own layer
    decay = {0: 0.0, 1: math.log(4) / 128, 2: math.log(4) / 12}[eviction]
    n_uses: Counter[tuple[int, int]] = Counter()
    last_use: dict[tuple[int, int], float] = {}  # of what is resident

    def worth(expert: tuple[int, int], layer: float) -> float:
        if eviction == 0:
            return last_use[expert]
        # a layer that this pass has yet to reach has had one visit less
        unvisited = at_once if eviction == 2 and expert[0] > layer else 0
        return math.log(n_uses[expert]) + (last_use[expert] + unvisited) * decay

    n_misses = 0
    for (number, layer), needs in by_pass.items():
        step = at[number, layer]
        missing = [need for need in dict.fromkeys(needs) if need not in last_use]
        n_misses += len(missing)
        n_uses.update(needs)
        # ties go by layer and expert
        last_use.update({need: step[need] for need in needs if need in last_use})
        for need in missing:
            if len(last_use) == n_slots:
                _, victim = min((worth(expert, layer), expert) for expert in last_use if expert not in needs)
                del last_use[victim]
            last_use[need] = step[need]
    assert counters["n_misses"] == n_misses
