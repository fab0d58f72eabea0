"""Progress as a callback: a phase in words and the share done."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, float], None]


def ignore(phase: str, done: float) -> None:
    """Do nothing; stands in where the caller asked for no progress."""


def scaled(progress: Progress, start: float, stop: float) -> Progress:
    """Return a progress whose 0 to 1 is `start` to `stop` of the given one."""
    return lambda phase, done: progress(phase, start + (stop - start) * done)
