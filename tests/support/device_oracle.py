"""What a device has to give: the run on the CPU alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_models
from engine_jobs import on_engine, run, succeeded, tokens

PROMPT = tokens(40, 31)  # more than fit the cache's batches
N_STEPS = 64
FOLLOWING = tokens(N_STEPS, 32)

# The order of sums differs from place to place, and kernels from processor to processor: a rounding apart at
# first, which quantised activations and the float16 cache magnify, and which now and then makes a router
# choose another expert of two that score alike. A wrong expert is further off, in every row that follows
# (test_the_oracle_sees_wrong_experts).
CLOSE, SHARE_OF_CLOSE_ROWS = 0.1, 0.9


def follow(n: int = N_STEPS, save: str = "rows") -> list[dict[str, Any]]:
    """Runs a prompt and then the same tokens on every processor: a greedy choice hangs on the last bit."""
    return [{"op": "clear"}, {"op": "follow", "tokens": PROMPT, "following": FOLLOWING[:n], "save": save}]


@cache
def on_cpu(model: str | Path, n: int = N_STEPS) -> np.ndarray:
    """The logits of the CPU alone, [n + 1, n_vocab]."""
    return succeeded(on_engine(run("cpu", model, follow(n), 0))).arrays["cpu/rows"]


def assert_as_on_cpu(outcome: Any, name: str, model: str | Path, n: int = N_STEPS) -> None:
    """Every ``follow`` of a run gives the CPU's likeliest tokens, and the last one its logits."""
    expected = on_cpu(model, n)
    for result in outcome.ops(name, "follow"):
        assert_likeliest(result["likeliest"], expected, name)
    assert_close(outcome.arrays[f"{name}/rows"], expected, name)


def assert_likeliest(
    likeliest: list[int],
    expected: np.ndarray,
    label: str,
    *others: np.ndarray,
    close: float = CLOSE,
    share: float = SHARE_OF_CLOSE_ROWS,
) -> None:
    """The tokens that a ``follow`` found likeliest are so by ``expected`` or one of ``others``, each
    [n_rows, n_vocab], or nearly."""
    behind = [
        logits.max(axis=1) - logits[np.arange(len(logits)), likeliest] for logits in (expected, *others)
    ]
    assert (np.min(behind, axis=0) <= 2 * close).mean() > share, label


def same_choices(tokens: list[int], expected: list[int], logits: np.ndarray, label: str) -> bool:
    """Whether an answer has the tokens that were expected, chosen greedily by ``logits`` [n, n_vocab].

    It may go its own way only where two tokens are so near that a rounding decides; otherwise it fails.
    """
    assert len(tokens) == len(expected) == len(logits), label
    for ours, theirs, row in zip(tokens, expected, logits, strict=True):
        if ours != theirs:
            assert row[theirs] - row[ours] <= 2 * CLOSE, f"{label}: {ours} instead of {theirs}"
            return False
    return True


def assert_close(
    actual: np.ndarray,
    expected: np.ndarray,
    label: str,
    *others: np.ndarray,
    close: float = CLOSE,
    share: float = SHARE_OF_CLOSE_ROWS,
) -> None:
    """Fails unless logits [n, n_vocab] are finite, and close to ``expected``, or to one of ``others``, in
    nearly every row."""
    assert actual.shape == expected.shape, label
    assert np.isfinite(actual).all(), f"{label}: not finite"
    furthest = np.min([np.abs(actual - logits).max(axis=1) for logits in (expected, *others)], axis=0)
    assert (furthest <= close).mean() > share, f"{label}: apart by {np.round(furthest, 3)}"


def expert_bytes(model: str) -> tuple[int, int]:
    """Of one expert, biases included: the smallest and the largest of all layers."""
    by_layer: dict[int, int] = {}
    for part in sorted(tiny_models.path(model).parent.glob("*.gguf")):
        for tensor in gguf.GGUFReader(part).tensors:
            if "_exps." in tensor.name:
                layer = int(tensor.name.split(".")[1])
                by_layer[layer] = by_layer.get(layer, 0) + int(tensor.n_bytes)
    n_expert = tiny_models.MODELS[model].n_expert
    return min(by_layer.values()) // n_expert, max(by_layer.values()) // n_expert
