"""Which segments of experts are kept before others: Python's side of ``mobile_set_split`` (MoEpic)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from .binding import Engine


@dataclass(frozen=True)
class Split:
    """By the model's layers: ``kept`` leading segments of an expert rank as the eviction policy says.

    The others come for a use and are the first to go. ``shares`` of the budget are what a layer fills before
    it gives way, 0: no wish.
    """

    kept: tuple[int, ...]
    shares: tuple[float, ...]


def set_split(engine: Engine, ctx: int, split: Split | None, *, on_device: bool = False) -> None:
    """Put ``split`` in force for host memory, or for the slots of devices; None: whole experts.

    It changes when bytes move, never what is computed. Raises UsageError if it does not fit the model,
    EngineError for slots that there are not.
    """
    doing = "choosing which segments are kept"
    if split is None:
        engine.checked("set_split", doing, ctx, on_device, None, None, 0)
        return
    n = len(split.kept)
    kept = (ctypes.c_int32 * n)(*split.kept)
    shares = (ctypes.c_float * len(split.shares))(*split.shares)
    engine.checked("set_split", doing, ctx, on_device, kept, shares, n)
