"""Progress as a callback: a phase in words, and the share of it that is done, 0 to 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, float], None]


def no_progress(_phase: str, _done: float) -> None:
    """Stands in where nobody wants to know."""


def scaled(progress: Progress, start: float, stop: float) -> Progress:
    """A progress whose 0 to 1 is ``start`` to ``stop`` of the given one."""
    return lambda phase, done: progress(phase, start + (stop - start) * done)
