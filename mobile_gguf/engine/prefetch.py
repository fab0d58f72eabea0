"""Moving experts ahead of need: Python's side of ``mobile_set_prefetch`` in ``patches/src/mobile.h``.

It changes when bytes are read and uploaded, never outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mobile_gguf.errors import UsageError
from mobile_gguf.options.words import OFF, ON

from .binding import Engine

AUTO = "auto"
PREFETCH = {OFF: 0, ON: 1, AUTO: 2}
# auto: the router where the model has a plain one.
PREDICTORS = {"auto": 0, "router": 1, "transitions": 2}

_COUNTS = (
    "n_predicted",
    "n_right",
    "n_queued",
    "n_used",
    "n_wasted",
    "n_unused",
    "bytes_early",
    "bytes_wasted",
    "saved_us",
    "n_passes",
    "n_passes_on",
)
_STATES = (
    "mode",
    "by_router",
    "next_on",
    "masked_on",
    "next_permille",
    "masked_permille",
    "device_next_on",
    "device_masked_on",
    "device_next_permille",
    "device_masked_permille",
)


class PrefetchCountersStruct(ctypes.Structure):
    """``struct mobile_prefetch_counters``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _COUNTS),
        *((name, ctypes.c_int32) for name in _STATES),
    ]


@dataclass(frozen=True)
class PrefetchCounters:
    """What was read ahead since the last reset of the counters, and what is in use now.

    Counts, bytes and microseconds as in mobile.h: ``n_queued`` experts were read, of which ``n_used`` were
    needed before they left memory, ``n_wasted`` left it unused; ``n_unused`` are there still. ``saved_us``
    is an estimate: the bytes that had arrived when they were needed, times the stall that a byte read on
    demand cost. ``next_permille`` is the time of a pass with predictions over one without, as measured
    last; 0: not yet. ``device_...``: the same for uploads, which ``DeviceCounters`` counts.
    """

    n_predicted: int = 0
    n_right: int = 0
    n_queued: int = 0
    n_used: int = 0
    n_wasted: int = 0
    n_unused: int = 0
    bytes_early: int = 0
    bytes_wasted: int = 0
    saved_us: int = 0
    n_passes: int = 0
    n_passes_on: int = 0
    mode: int = 0
    by_router: int = 0
    next_on: int = 0
    masked_on: int = 0
    next_permille: int = 0
    masked_permille: int = 0
    device_next_on: int = 0
    device_masked_on: int = 0
    device_next_permille: int = 0
    device_masked_permille: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For ``Model.stats()``: ratios are None until they were measured."""
        return {
            "mode": {number: name for name, number in PREFETCH.items()}[self.mode],
            "predictor": "router" if self.by_router else "transitions",
            "next_layer_on": bool(self.next_on),
            "little_pass_on": bool(self.masked_on),
            "next_layer_time_ratio": self.next_permille / 1000 or None,
            "little_pass_time_ratio": self.masked_permille / 1000 or None,
            "next_layer_uploads_on": bool(self.device_next_on),
            "little_pass_uploads_on": bool(self.device_masked_on),
            "next_layer_uploads_time_ratio": self.device_next_permille / 1000 or None,
            "little_pass_uploads_time_ratio": self.device_masked_permille / 1000 or None,
            **{name: getattr(self, name) for name in _COUNTS},
        }


def set_prefetch(engine: Engine, ctx: int, mode: str) -> None:
    """Move experts ahead of need on ``ctx``: ``on``, ``off``, or ``auto``, while it is measured to help."""
    engine.checked("set_prefetch", "setting the prefetch mode", ctx, _number("prefetch", PREFETCH, mode))


def holder(engine: Engine, ctx: int, mode: str) -> Callable[[bool], None] | None:
    """Keeps ``auto`` still while something else is being measured: called with True it reads nothing ahead,
    with False it begins its trials anew, under what is in force by then. None where ``mode`` is no trial.
    """
    if mode != AUTO:
        return None
    return lambda on: set_prefetch(engine, ctx, OFF if on else AUTO)


def set_predictor(engine: Engine, ctx: int, predictor: str) -> None:
    """Predict the next layer's experts by its ``router``, by ``transitions`` counted so far, or ``auto``.

    Raises EngineError for ``router`` if the model has none that sees the feed-forward layer's input.
    """
    number = _number("predictor", PREDICTORS, predictor)
    engine.checked("set_predictor", f"predicting by {predictor}", ctx, number)


def prefetch_counters(engine: Engine, ctx: int) -> PrefetchCounters:
    """What was read ahead on ``ctx``."""
    # an engine of the same ABI may append fields
    block = ctypes.create_string_buffer(ctypes.sizeof(PrefetchCountersStruct) + 256)
    struct = PrefetchCountersStruct.from_buffer(block)
    engine.checked("get_prefetch_counters", "reading the prefetch counters", ctx, ctypes.byref(struct))
    return PrefetchCounters(**{name: int(getattr(struct, name)) for name in (*_COUNTS, *_STATES)})


def _number(name: str, choices: dict[str, int], value: str) -> int:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}: choose {', '.join(choices)}")
    return choices[value]
