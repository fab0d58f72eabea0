"""The rung of partial experts against Transformers, where other neurons of such an expert do nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import layout_files
import loss_oracle as oracle
import numpy as np
import pytest
import tiny_models
from engine_jobs import on_engine, run, succeeded
from loss_jobs import in_transformers, scripted_parts, set_up, text_of, under

S = 4
# with weights of a fixed sum and others; experts of gpt-oss have biases, and no segments
MODELS = ("qwen3moe", "olmoe", "qwen2moe", "deepseek3")
RULES: dict[str, dict[str, Any]] = {
    "half": {"partial": 0.5},
    "anything, all but the heaviest": {"partial": 0.25, "keep": 1},
    "and the rest dropped": {"partial": 0.5, "keep": 0, "drop": 1.0},
    "and the rest by others": {"partial": 0.75, "substitute": oracle.LIVE, "margin": 1.0},
    "after Cache-Prior": {"partial": 0.5, "substitute": oracle.PRIOR, "prior": 0.2},
}
COUNTS = ("n_missing", "n_dropped", "n_substituted", "n_partial", "moved_weight")


@cache
def transformers_logits() -> dict[str, np.ndarray]:
    entries = {
        model: {"rules": {"off": {}, **RULES}, "mass": {}, "parts": scripted_parts(model, S)}
        for model in MODELS
    }
    return in_transformers(entries)


@pytest.mark.parametrize("model", MODELS)
def test_segments_that_are_there_equal_transformers(model: str, tmp_path: Path) -> None:
    reference, tolerance = transformers_logits(), tiny_models.MODELS[model].tolerance
    path = layout_files.write_per_expert(tiny_models.path(model), tmp_path / "m.gguf", S)
    ops = [*set_up(model), {"op": "loss_residency", "resident": scripted_parts(model, S)}]
    for rule, rules in {"off": None, **RULES}.items():
        ops += under(rules, text_of(model), rule)
    outcome = succeeded(on_engine(run("r", path, ops, "min", f32_kv=True)))
    exact = reference[f"{model}/off"]
    for rule, counted in zip(["off", *RULES], outcome.ops("r", "loss_counters"), strict=True):
        want, got = reference[f"{model}/{rule}"], outcome.arrays[f"r/{rule}"]
        assert np.abs(got - want).max() <= tolerance, rule
        if rule == "off":
            continue
        assert np.abs(want - exact).max() > 20 * tolerance, f"{rule} does nothing on {model}"
        assert counted["n_partial"] > 0, rule
        for name in COUNTS:
            told = float(reference.get(f"{model}/{rule}/{name}", 0.0))
            assert counted[name] == pytest.approx(told, rel=1e-4), (rule, name)
