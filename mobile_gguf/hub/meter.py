"""How far a transfer is, in words: bytes, speed, time left."""

from __future__ import annotations

import time
from collections import deque

from mobile_gguf.progress import Progress
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import format_duration

_WINDOW_S = 5.0
_PAUSE_S = 0.1


class Meter:
    """Counts the bytes of a transfer of ``total`` bytes, tells ``progress`` of them ten times a second."""

    def __init__(self, name: str, total: int, progress: Progress) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.received = 0
        self._progress = progress
        self._told = 0.0
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, n_bytes: int) -> None:
        """So many bytes have come."""
        self.received += n_bytes
        self.skip(n_bytes)

    def skip(self, n_bytes: int) -> None:
        """So many bytes were there already; negative: are to come again."""
        self.done += n_bytes
        now = time.monotonic()
        if now - self._told >= _PAUSE_S or self.done >= self.total:
            self._told = now
            self._recent.append((now, self.received))
            while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_S:
                self._recent.popleft()
            self._progress(self.text(), self.share)

    def say(self, text: str) -> None:
        """Show something else for once."""
        self._progress(f"{self.name}: {text}", self.share)

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 1.0

    @property
    def bytes_per_second(self) -> float:
        """Over the last seconds."""
        (first, before), (last, after) = self._recent[0], self._recent[-1]
        return (after - before) / (last - first) if last > first else 0.0

    def text(self) -> str:
        """``NAME: 1.20 GiB of 17.28 GiB, 45.1 MiB/s, 6:10 left``."""
        parts = [f"{self.name}: {format_bytes(self.done)} of {format_bytes(self.total)}"]
        if rate := self.bytes_per_second:
            parts.append(f"{format_bytes(rate)}/s")
            if self.done < self.total:
                parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)
