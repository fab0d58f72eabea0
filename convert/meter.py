"""Progress in the words of all steps: which tensor of how many, bytes of bytes, and how long it will take."""

from __future__ import annotations

import time

from mobile_gguf.progress import Progress
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import format_duration

_SECONDS_BETWEEN_REPORTS = 0.1
_SECONDS_BEFORE_ETA = 2.0


class Meter:
    """Tells a progress callback of a phase that handles ``total`` bytes; remembers how long that took."""

    def __init__(self, progress: Progress, phase: str, total: int) -> None:
        self.progress, self.phase, self.total = progress, phase, max(1, total)
        self.started = time.monotonic()
        self._reported = 0.0

    def update(self, index: int, n_tensors: int, done: int) -> None:
        """Tensor ``index`` of ``n_tensors`` is being handled, ``done`` bytes are through."""
        now = time.monotonic()
        share = min(1.0, done / self.total)
        if share < 1 and now - self._reported < _SECONDS_BETWEEN_REPORTS:
            return
        self._reported = now
        text = f"{self.phase}: tensor {index}/{n_tensors}, {format_bytes(done)} of {format_bytes(self.total)}"
        elapsed = now - self.started
        if elapsed > _SECONDS_BEFORE_ETA and 0 < share < 1:
            text += f", ETA {format_duration(elapsed / share * (1 - share))}"
        self.progress(text, share)

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self.started
