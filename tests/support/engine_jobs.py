"""Jobs for ``engine_child``: runs on tiny models, and what their results must look like."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import numpy as np
import pytest
import tiny_models


def tokens(n: int, seed: int, vocab: int = tiny_models.VOCAB) -> list[int]:
    """n random token ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


def run(
    name: str,
    model: str | Path,
    ops: list[dict[str, Any]],
    budget: int | str | None = "min",
    *,
    mobile: dict[str, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A run of ``engine_child`` on a file, or on the tiny model of that name.

    budget: bytes, "40%", "min", 0 for all, or None for a load without load parameters.
    mobile: other load parameters. settings: of the model and context, see ``engine_child``.
    """
    path = model if isinstance(model, Path) else tiny_models.path(model)
    load = None if budget is None else {"budget": budget, **(mobile or {})}
    return {"name": name, "model": str(path), "mobile": load, "ops": ops, **settings}


def succeeded(outcome: engine_libs.Outcome) -> engine_libs.Outcome:
    """Returns ``outcome``, in which every load, decode and call must have succeeded."""
    for name, result in outcome.runs.items():
        assert result["loaded"], f"{name} did not load: {result['load_error']} {result['log'][-500:]}"
        for op in result["ops"]:
            assert op.get("rc", 0) == 0, f"{name}: {op}"
            assert op.get("status", 0) >= 0, f"{name}: {op}"
    return outcome


def on_engine(*runs: dict[str, Any], **how: Any) -> engine_libs.Outcome:
    """Runs a job on the patched build; how: see ``engine_libs.run_job``."""
    return engine_libs.run_job(engine_libs.engine_lib(), list(runs), **how)


def on_stock(*runs: dict[str, Any]) -> engine_libs.Outcome:
    """Runs a job on the stock build."""
    return engine_libs.run_job(engine_libs.stock_lib(), list(runs))


def read_trace(path: Path) -> list[dict[str, float]]:
    """The rows of a trace, numbers by column."""
    with path.open(newline="") as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, label: str) -> None:
    """Fails unless both arrays hold the same finite float32 bits; says where they first differ."""
    assert actual.shape == expected.shape, f"{label}: shapes {actual.shape} and {expected.shape}"
    assert np.isfinite(expected).all(), f"{label}: the expected logits are not finite"
    different = np.argwhere(actual.view(np.uint32) != expected.view(np.uint32))
    if len(different):
        first = tuple(int(i) for i in different[0])
        pytest.fail(
            f"{label}: {len(different)} of {actual.size} logits differ, first at {first}: "
            f"{actual[first]!r} instead of {expected[first]!r}; largest difference "
            f"{np.nanmax(np.abs(actual - expected)):.3g}"
        )


# one generation whose right logits are known, to see whether the engine still works after a fault

GOOD_MODEL = "mixtral"
PROMPT = tokens(24, 11)
FOLLOWING = tokens(12, 12)


def good(name: str) -> list[dict[str, Any]]:
    """Ops that compute a prompt and some tokens from nothing; see ``assert_good``."""
    return [
        {"op": "clear"},
        {"op": "decode", "tokens": PROMPT, "save": f"{name}-prompt"},
        {"op": "steps", "tokens": FOLLOWING, "pos": len(PROMPT), "save": f"{name}-steps"},
    ]


@cache
def good_logits() -> dict[str, np.ndarray]:
    """What the stock build computes for ``good``: "prompt" and "steps"."""
    arrays = succeeded(on_stock(run("r", GOOD_MODEL, good("good"), None))).arrays
    return {part: arrays[f"r/good-{part}"] for part in ("prompt", "steps")}


def assert_good(outcome: engine_libs.Outcome, run_name: str, name: str = "good") -> None:
    """Fails unless the ops of ``good(name)`` gave the stock build's logits."""
    for part, expected in good_logits().items():
        assert_same_bits(outcome.arrays[f"{run_name}/{name}-{part}"], expected, f"{run_name}, {name} {part}")
