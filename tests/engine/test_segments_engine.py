"""Experts in segments mean what whole experts mean: little, masks, traces, replays, counters, residency.

Float32 models and float32 KV, so that only the order of a sum differs from the stacked file.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import layout_files
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, run, succeeded, tokens

N_SEGMENTS = 4
N = 20
TEXT, PROMPT = tokens(N, 3), {"op": "decode", "tokens": tokens(N, 3)}
F32: dict[str, Any] = {"f32_kv": True}
MODELS = [
    "mixtral",
    "llama4",
    "granitemoe-swa",
    "nemotron-h",
]  # renormalised, weighted before, merged, ungated


@pytest.fixture
def segmented(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source = tiny_models.path(request.param)
    return layout_files.write_per_expert(source, tmp_path / "m.gguf", N_SEGMENTS, seed=2)


EACH_MODEL = pytest.mark.parametrize(
    ("model", "segmented"), [(m, m) for m in MODELS], indirect=["segmented"], ids=MODELS
)
MIXTRAL = pytest.mark.parametrize("segmented", ["mixtral"], indirect=True)


def assert_close(actual: np.ndarray, expected: np.ndarray, label: str) -> None:
    difference = np.abs(actual - expected).max() / np.abs(expected).max()
    assert difference < 1e-5, f"{label}: {difference}"


@EACH_MODEL
def test_little_is_that_of_whole_experts(model: str, segmented: Path) -> None:
    k = tiny_models.MODELS[model].little_k
    mask = [k if i % 3 else 0 for i in range(N)]
    ops = [
        {**PROMPT, "save": "big"},
        {"op": "set_k", "k": k}, {"op": "clear"}, {**PROMPT, "save": "little"},
        {"op": "clear"}, {"op": "steps", "tokens": TEXT, "pos": 0, "save": "steps"},
        {"op": "set_k", "k": 0}, {"op": "clear"}, {**PROMPT, "k": mask, "save": "mixed"},
    ]  # fmt: skip
    runs = [run(name, path, ops, budget, **F32) for name, path, budget in (
        ("whole", tiny_models.path(model), "min"), ("min", segmented, "min"), ("joined", segmented, 0),
    )]  # fmt: skip
    arrays = succeeded(on_engine(*runs)).arrays
    assert np.abs(arrays["whole/big"] - arrays["whole/little"]).max() > 0.01
    for saved in ("big", "little", "steps", "mixed"):
        for name in ("min", "joined"):
            assert_close(arrays[f"{name}/{saved}"], arrays[f"whole/{saved}"], f"{name}, {saved}")


def routing(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [
            {key: row[key] for key in ("turn", "phase", "step", "layer", "slot", "expert")}
            for row in csv.DictReader(file)
        ]


@MIXTRAL
def test_traces_name_the_models_experts(segmented: Path, tmp_path: Path) -> None:
    source = tiny_models.path("mixtral")
    traces = {name: tmp_path / f"{name}.csv" for name in ("whole", "segments")}
    outcome = succeeded(on_engine(*(
        run(name, path, [
            {"op": "trace_start", "path": str(traces[name])}, {"op": "reset_counters"}, PROMPT,
            {"op": "steps", "tokens": TEXT, "pos": N}, {"op": "counters"}, {"op": "trace_stop"},
        ], "min", **F32)
        for name, path in (("whole", source), ("segments", segmented))
    )))  # fmt: skip
    assert routing(traces["segments"]) == routing(traces["whole"])
    whole, ours = (outcome.ops(name, "counters")[0] for name in ("whole", "segments"))
    # a use of an expert is a need of each of its segments, and the same bytes
    assert ours["n_hits"] + ours["n_misses"] == N_SEGMENTS * (whole["n_hits"] + whole["n_misses"])
    assert ours["bytes_routed"] == whole["bytes_routed"]
    # what a trace says a token had to read, the counters say too: one token, each expert once
    with traces["segments"].open() as file:
        missed = sum(int(row["expert_bytes"]) for row in csv.DictReader(file) if row["phase"] == "1")
    segment = outcome.runs["segments"]["info"]["expert_bytes"] // (4 * 8 * N_SEGMENTS)
    assert missed % segment == 0
    assert 0 < missed <= segment * ours["n_misses"]


@MIXTRAL
def test_replay_of_whole_experts(segmented: Path) -> None:
    n_layer, k = 4, 2
    ids = np.random.default_rng(3).permuted(np.tile(np.arange(8), (N, n_layer, 1)), axis=2)[:, :, :k]
    ops = [{"op": "replay", "ids": ids.tolist()}, {"op": "steps", "tokens": TEXT, "pos": 0, "save": "steps"}]
    too_high = [{"op": "replay", "ids": np.full((1, n_layer, k), 8).tolist()}]
    arrays = succeeded(on_engine(
        run("whole", "mixtral", ops, "min", **F32), run("segments", segmented, ops, "min", **F32)
    )).arrays  # fmt: skip
    assert_close(arrays["segments/steps"], arrays["whole/steps"], "replay")
    refused = on_engine(run("r", segmented, too_high, "min", **F32))
    assert refused.ops("r", "replay")[0]["status"] < 0


@MIXTRAL
def test_residency_is_by_expert(segmented: Path) -> None:
    ops = [PROMPT, {"op": "residency", "save": "some"}]
    outcome = succeeded(on_engine(run("some", segmented, ops, "40%"), run("all", segmented, ops, 1 << 60)))
    some, everything = outcome.arrays["some/some"], outcome.arrays["all/some"]
    assert some.shape == (4, 8)
    assert (everything == 2).all()
    assert 0 < (some == 2).sum() < some.size


@MIXTRAL
def test_prefetch_reads_all_segments_of_what_was_masked(segmented: Path) -> None:
    """The second pass with all experts finds them there, and is right."""
    ops = [
        PROMPT, {"op": "reset_counters"},
        {"op": "set_prefetch", "mode": 1},
        {"op": "set_k", "k": 1}, {"op": "steps", "tokens": TEXT[:1], "pos": N}, {"op": "prefetch"},
        {"op": "set_k", "k": 0}, {"op": "remove", "pos": N}, {"op": "counters"},
        {"op": "steps", "tokens": TEXT[:1], "pos": N, "save": "big"}, {"op": "counters"},
    ]  # fmt: skip
    straight = [PROMPT, {"op": "steps", "tokens": TEXT[:1], "pos": N, "save": "big"}]
    outcome = succeeded(
        on_engine(run("r", segmented, ops, "70%", **F32), run("straight", segmented, straight, "70%", **F32))
    )
    assert_same_bits(outcome.arrays["r/big"], outcome.arrays["straight/big"], "after a prefetch")
    queued = outcome.ops("r", "prefetch")[0]["status"]
    counters = outcome.ops("r", "counters")[0]
    assert counters["n_prefetched"] <= queued
    assert 0 < queued <= 4 * N_SEGMENTS


@MIXTRAL
def test_a_read_that_fails_names_the_segment(segmented: Path) -> None:
    """The file loses its end, the last layer's experts, after it was loaded."""

    def cut() -> None:
        with segmented.open("r+b") as file:
            file.truncate(segmented.stat().st_size - 64 * 1024)

    ops = [{"op": "pause", "name": "cut"}, PROMPT, {"op": "steps", "tokens": TEXT, "pos": N}]
    outcome = on_engine(run("r", segmented, ops, "min"), on_pause={"cut": cut})
    failed = [op for op in outcome.runs["r"]["ops"] if op.get("rc", 0) != 0]
    assert failed
    for op in failed:
        assert re.search(r"m\.gguf: layer 3, expert [67], segment \d \(blk\.3\.ffn_", op["error"]), op[
            "error"
        ]
