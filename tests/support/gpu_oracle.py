"""What a GPU has to give: in each row the CPU's logits, or those of the stock graph on that GPU.

A GPU's kernels round otherwise than the CPU's, and otherwise for a batch than for a token (TensorFloat-32 in
matrices, activations in blocks of 32), so a router chooses another expert of two that score alike now and
then, with the stock graph too. How far the two references are apart says how much that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from device_oracle import CLOSE, assert_close, assert_likeliest

# One wrong expert in a slot leaves up to three rows of four alone; a router's choice of another, more than
# nine of ten (test_gpu_oracle).
SHARE_OF_CLOSE_ROWS = 0.85

# Rounding makes half of CLOSE of a quantised model's rows, and a wrong expert at least CLOSE.
TIMES_THE_MEDIAN, FURTHEST = 3.0, 0.25


@dataclass(frozen=True)
class References:
    """Logits [n, n_vocab] of the same tokens."""

    on_cpu: np.ndarray
    on_gpu: np.ndarray

    @property
    def apart(self) -> np.ndarray:
        """How far the two are from each other, by row."""
        return np.abs(self.on_cpu - self.on_gpu).max(axis=1)

    @property
    def close(self) -> float:
        """What the rounding of kernels explains."""
        return float(np.clip(TIMES_THE_MEDIAN * np.median(self.apart), CLOSE, FURTHEST))

    def assert_close(self, actual: np.ndarray, label: str) -> None:
        """Logits [n, n_vocab] of the same tokens; prints how close they are."""
        nearest = np.min(
            [np.abs(actual - logits).max(axis=1) for logits in (self.on_cpu, self.on_gpu)], axis=0
        )
        own, theirs = (np.round(np.quantile(values, (0.5, 0.9, 1)), 4) for values in (nearest, self.apart))
        label = f"{label}: median, nine of ten and all within {own} (CPU and GPU: {theirs})"
        print(label)
        assert_close(actual, self.on_cpu, label, self.on_gpu, close=self.close, share=SHARE_OF_CLOSE_ROWS)

    def assert_followed(self, outcome: Any, name: str) -> None:
        """All rows that a run has followed, saved as "rows" and a label, and the likeliest tokens."""
        saved = [key for key in outcome.arrays if key.startswith(f"{name}/rows")]
        followed = outcome.ops(name, "follow")
        assert saved, f"{name} saved no rows"
        assert followed, f"{name} followed nothing"
        for key in saved:
            self.assert_close(outcome.arrays[key], key)
        for i, result in enumerate(followed):
            assert_likeliest(
                result["likeliest"], self.on_cpu, f"{name}, follow {i}", self.on_gpu,
                close=self.close, share=SHARE_OF_CLOSE_ROWS,
            )  # fmt: skip
