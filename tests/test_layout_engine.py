"""The engine on files with one tensor per expert: what it computes from a stacked file, bit for bit.

The per-expert files are written here with the `gguf` package (`layout_files`), not by the converter under test.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import layout_files
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, on_stock, run, succeeded, tokens

LENGTHS = {
    7: 8,
    64: 4,
    513: 2,
}  # prompt length (513 does not fit one ubatch of 512) -> single tokens after it
BUDGETS: dict[str, int | str | None] = {"40%": "40%", "min": "min", "slots": 1 << 60, "all": 0, "plain": None}
FAMILIES = [
    "mixtral", "olmoe-bf16", "deepseek3", "llama4",
    "granitemoe-swa",  # gate and up in one tensor
    "gpt-oss-mxfp4",  # biases
    "qwen3moe-scales", "gemma4",  # scales; both
    "nemotron-h",  # no gate
    "qwen2moe-q8_0", "qwen3moe-q4_k",  # types that differ between layers
    "mixtral-split",
]  # fmt: skip


def generate() -> list[dict[str, Any]]:
    ops: list[dict[str, Any]] = []
    for n, n_steps in LENGTHS.items():
        ops += [
            {"op": "clear"},
            {"op": "decode", "tokens": tokens(n, 100 + n), "save": f"prefill-{n}"},
            {"op": "steps", "tokens": tokens(n_steps, 200 + n), "pos": n, "save": f"steps-{n}"},
        ]
    return ops


@cache
def stock(model: str, **settings: bool) -> dict[str, np.ndarray]:
    """The stock build's logits of `generate` on the stacked file, by name."""
    arrays = succeeded(on_stock(run("r", model, generate(), None, **settings))).arrays
    return {name.removeprefix("r/"): array for name, array in arrays.items()}


def assert_equals(outcome: engine_libs.Outcome, name: str, expected: dict[str, np.ndarray]) -> None:
    assert expected
    for array, values in expected.items():
        assert_same_bits(outcome.arrays[f"{name}/{array}"], values, f"{name}, {array}")


@pytest.mark.parametrize("model", FAMILIES)
def test_per_expert_file_equals_stacked(model: str, tmp_path: Path) -> None:
    source = tiny_models.path(model)
    # the gguf package gives a file's own alignment to the first part only
    split = {"split_max_tensors": 60, "alignment": 32} if model.endswith("split") else {}
    path = layout_files.write_per_expert(source, tmp_path / "m.gguf", **split)
    assert bool(split) == (len(layout_files.parts(path)) > 1)
    outcome = succeeded(on_engine(*(run(name, path, generate(), budget) for name, budget in BUDGETS.items())))
    for name in BUDGETS:
        assert_equals(outcome, name, stock(model))
    stacked = succeeded(on_engine(run("min", source, [], "min"))).runs["min"]["info"]
    for name in BUDGETS:
        info = outcome.runs[name]["info"]
        if name != "plain":
            assert info["n_expert"] == stacked["n_expert"]
            assert info["expert_bytes"] == stacked["expert_bytes"]
    assert outcome.runs["plain"]["info"] is None


# models whose experts can be cut: no biases or scales, blocks no longer than a segment
SEGMENTED = {"mixtral": 4, "deepseek3": 2, "llama4": 2, "granitemoe-swa": 4, "nemotron-h": 2}
QUANTISED = {"qwen2moe-q8_0": 2, "qwen3moe-q4_0": 8}


def assert_close(outcome: engine_libs.Outcome, name: str, expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Equal but for the order of summation, relative to the largest logit."""
    assert expected
    for array, values in expected.items():
        actual = outcome.arrays[f"{name}/{array}"]
        assert np.isfinite(actual).all()
        difference = np.abs(actual - values).max() / np.abs(values).max()
        assert difference < tolerance, f"{name}, {array}: {difference}"


@pytest.mark.parametrize("model", [*SEGMENTED, *QUANTISED])
def test_segments_equal_whole_experts(model: str, tmp_path: Path) -> None:
    """In the store and joined in ordinary buffers; the neurons of each expert are in another order."""
    n_segments, float_weights = (SEGMENTED | QUANTISED)[model], model in SEGMENTED
    settings = {"f32_kv": True}  # half precision would blow differences up
    expected = stock(model, **settings)
    seed = 5 if float_weights else None  # quantised rows cannot be shuffled
    path = layout_files.write_per_expert(tiny_models.path(model), tmp_path / "m.gguf", n_segments, seed)
    runs = [run(name, path, generate(), budget, **settings) for name, budget in BUDGETS.items()]
    outcome = succeeded(on_engine(*runs))
    for name in BUDGETS:
        # a quantised model rounds activations, and rounds a sum of other parts differently
        assert_close(outcome, name, expected, 1e-5 if float_weights else 0.1)
        if name in ("40%", "min"):
            assert_equals(outcome, name, {array: outcome.arrays[f"slots/{array}"] for array in expected})
    assert_equals(outcome, "all", {array: outcome.arrays[f"plain/{array}"] for array in expected})
    if not float_weights:  # joined, it is the stacked file
        assert_equals(outcome, "plain", expected)
