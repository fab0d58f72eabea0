"""The warm set: what was worth keeping when a model was closed is read again when it is loaded.

Python's side of ``mobile_warm`` in ``patches/src/mobile.h``, which says when; ``warm_files.py`` keeps the
ids. It changes when bytes are read, never outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path

from mobile_gguf.errors import MobileError
from mobile_gguf.files.stamps import stamps

from . import warm_files
from .binding import Engine
from .structs import WarmCounters, WarmCountersStruct, struct_fields, with_slack


def worth(engine: Engine, ctx: int) -> warm_files.Experts:
    """(layer, expert) of what single tokens used on ``ctx``, the most used first."""
    doing = "asking which experts were used"
    n = engine.checked("get_worth", doing, ctx, None, 0)
    pairs = (ctypes.c_int32 * (2 * n))()
    engine.checked("get_worth", doing, ctx, pairs, n)
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def warm(engine: Engine, ctx: int, experts: Sequence[tuple[int, int]]) -> int:
    """Read ``experts`` in their order while there is nothing else to read; returns how many are not there.

    Raises UsageError if the model has no such expert.
    """
    pairs = (ctypes.c_int32 * (2 * len(experts)))(*(number for pair in experts for number in pair))
    return engine.checked("warm", "naming the warm set", ctx, pairs, len(experts))


def warm_counters(engine: Engine, ctx: int) -> WarmCounters:
    """What became of the warm set since the model was loaded."""
    struct = with_slack(WarmCountersStruct)
    engine.checked("get_warm_counters", "reading the warm set's counters", ctx, ctypes.byref(struct))
    return WarmCounters(**struct_fields(struct))


class WarmSet:
    """The warm set of a loaded model: ``begin`` once it is loaded, ``remember`` before it is freed."""

    def __init__(self, engine: Engine, ctx: int, path: Path, files: Sequence[Path]) -> None:
        self._engine, self._ctx, self._path = engine, ctx, path
        self._stamps: warm_files.Stamps | None = None  # a file that is gone by now is not remembered
        with contextlib.suppress(OSError):
            # those of the file that was loaded, whatever lies there when it is closed
            self._stamps = stamps(files)
        self._known: warm_files.Experts = []

    def begin(self) -> None:
        """Have what is remembered of the file read; what does not fit the model counts as nothing."""
        if self._stamps is None:
            return
        known = warm_files.remembered(self._path, self._stamps)
        with contextlib.suppress(MobileError):
            warm(self._engine, self._ctx, known)
            self._known = known

    def remember(self) -> None:
        """Remember what was used; nothing if nothing was, or in a forked child."""
        if self._stamps is None:
            return
        with contextlib.suppress(MobileError):
            if used := worth(self._engine, self._ctx):
                warm_files.remember(self._path, self._stamps, warm_files.merged(used, self._known))
