"""Leading segments in the slots of a device: an RPC server on loopback, evicted slots poisoned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layout_files
import pytest
import tiny_models
from device_jobs import CPU, FETCH, device_run, rpc_servers, succeeded_on_devices, until
from device_oracle import assert_close
from engine_jobs import assert_same_bits, tokens

MODEL, SEGMENTS = "qwen3moe", 2
SPEC = tiny_models.MODELS[MODEL]
N_LAYER = SPEC.config["num_hidden_layers"]
PROMPT, FOLLOWING = tokens(20, 31), tokens(20, 32)
HOST = "60%"  # of segments: where all experts are in memory they are whole
SPLITS: dict[str, dict[str, Any]] = {
    "whole": {"kept": None, "shares": None},
    "half": {"kept": [1] * N_LAYER, "shares": None},
    "wishes": {
        "kept": [1 + i % 2 for i in range(N_LAYER)],
        "shares": [(i + 1) / 100 for i in range(N_LAYER)],
    },
}


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with rpc_servers() as endpoints:
        yield endpoints


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "m.gguf"
    return layout_files.write_per_expert(tiny_models.path(MODEL), out, SEGMENTS)


def ops(split: dict[str, Any], miss: int, prefetch: int) -> list[dict[str, Any]]:
    steps = {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT), "save": "steps"}
    return [
        {"op": "device_start", "budget": 0.4, "miss": miss, "poison": 1},
        {"op": "split", "on_device": True, **split}, {"op": "split", **split},
        {"op": "set_prefetch", "mode": prefetch, "predictor": 0}, {"op": "decode", "tokens": PROMPT},
        steps, {"op": "device_counters"}, until([{"op": "remove", "pos": len(PROMPT)}, steps], n_hits=0),
    ]  # fmt: skip


def test_a_split_of_slots_changes_what_is_uploaded_and_nothing_else(segmented: Path, rpc: list[str]) -> None:
    """All computed on the device, with and without uploads ahead: the same bits. By the CPU, too: close."""
    jobs = {
        (name, miss, prefetch): ops(split, miss, prefetch)
        for name, split in SPLITS.items()
        for miss, prefetch in ((FETCH, 0), (FETCH, 1), (CPU, 1))
    }
    outcome = succeeded_on_devices(
        *(device_run(" ".join(map(str, job)), segmented, rpc, each, HOST) for job, each in jobs.items())
    )
    rows = {job: outcome.arrays[f"{' '.join(map(str, job))}/steps"] for job in jobs}
    uploaded = {}
    for job in jobs:
        name, miss, prefetch = job
        if miss == FETCH:
            assert_same_bits(rows[job], rows["whole", FETCH, 0], str(job))
        else:
            assert_close(rows[job], rows["whole", FETCH, 0], str(job))
        if not prefetch:
            uploaded[name] = outcome.ops(" ".join(map(str, job)), "device_counters")[0]["n_fetched"]
    assert len(set(uploaded.values())) == len(SPLITS), "no split changed what is uploaded"
