"""Progress in the words of all steps: which tensor of how many, bytes of bytes, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from mobile_gguf.sizes import format_bytes

Progress: TypeAlias = Callable[[str, float], None]
_SECONDS_BETWEEN_REPORTS = 0.1
_SECONDS_BEFORE_ETA = 2.0


def ignore(phase: str, done: float) -> None:
    """Do nothing; stands in where the caller asked for no progress."""


class Meter:
    """Tells a progress callback of a phase that handles `total` bytes; remembers how long that took."""

    def __init__(self, progress: Progress, phase: str, total: int) -> None:
        self.progress, self.phase, self.total = progress, phase, max(1, total)
        self.started = time.monotonic()
        self._reported = 0.0

    def update(self, index: int, n_tensors: int, done: int) -> None:
        """Tensor `index` of `n_tensors` is being handled, `done` bytes are through."""
        now = time.monotonic()
        share = min(1.0, done / self.total)
        if share < 1 and now - self._reported < _SECONDS_BETWEEN_REPORTS:
            return
        self._reported = now
        text = f"{self.phase}: tensor {index}/{n_tensors}, {format_bytes(done)} of {format_bytes(self.total)}"
        elapsed = now - self.started
        if elapsed > _SECONDS_BEFORE_ETA and 0 < share < 1:
            text += f", ETA {format_seconds(elapsed / share * (1 - share))}"
        self.progress(text, share)

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self.started


def format_seconds(seconds: float) -> str:
    """`42 s`, `3:07`, `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
