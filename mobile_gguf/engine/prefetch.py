"""Moving experts ahead of need: Python's side of ``mobile_set_prefetch`` in ``patches/src/mobile.h``.

It changes when bytes are read and uploaded, never outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from mobile_gguf.options.words import OFF

from .binding import Engine, choice
from .structs import PREFETCH, PrefetchCounters, PrefetchCountersStruct, struct_fields, with_slack

AUTO = "auto"


def set_prefetch(engine: Engine, ctx: int, mode: str) -> None:
    """Move experts ahead of need on ``ctx``: ``on``, ``off``, or ``auto``: uploads while they help."""
    engine.checked("set_prefetch", "setting the prefetch mode", ctx, choice("prefetch", PREFETCH, mode))


def holder(engine: Engine, ctx: int, mode: str) -> Callable[[bool], None] | None:
    """Keeps ``auto`` still while something else is being measured: called with True it moves nothing ahead,
    with False it begins its trials anew, under what is in force by then. None where ``mode`` is no trial.
    """
    if mode != AUTO:
        return None
    return lambda on: set_prefetch(engine, ctx, OFF if on else AUTO)


def prefetch_counters(engine: Engine, ctx: int) -> PrefetchCounters:
    """What was moved ahead on ``ctx``."""
    struct = with_slack(PrefetchCountersStruct)
    engine.checked("get_prefetch_counters", "reading the prefetch counters", ctx, ctypes.byref(struct))
    return PrefetchCounters(**struct_fields(struct))
