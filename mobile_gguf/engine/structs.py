"""The C API of ``patches/src/mobile.h`` as data: its structs, its numbers by name, and dataclasses of them.

Everything mirrors the header field by field, which ``tests/engine/test_structs.py`` holds; ``ABI_VERSION`` is
that of the header a library must have been built from.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from mobile_gguf.options.words import BUDDY, CACHE, HOST, LAYERS, LIVE, OFF, ON, PRIOR

ABI_VERSION = 8

# the engine's numbers for the words of the options
EVICTION = {"lru": 0, "moepic": 1, "decay": 2}
IO = {"auto": 0, "direct": 1, "buffered": 2}
MISS = {"auto": 0, "fetch": 1, "cpu": 2}
PLACEMENT = {HOST: 0, CACHE: 1, LAYERS: 2}
PREFETCH = {OFF: 0, ON: 1, "auto": 2}
SUBSTITUTE = {OFF: 0, BUDDY: 1, LIVE: 2, PRIOR: 3, "random": 4}  # random: only for experiments
GUESSED = {"none": 0, "draft": 1, "source": 2}
OBSERVE = {"routes": 1, "neurons": 2, "inputs": 4, "little": 8}
NOT_RESIDENT, LOADING, RESIDENT = 0, 1, 2
ROUTED_MAX = 65536  # entries of what was routed that a context keeps

# An engine of the same ABI may append fields; reading into a larger block keeps that harmless.
_SLACK_BYTES = 1024


def with_slack(struct: type[ctypes.Structure]) -> Any:
    """An empty struct that an engine of the same ABI may write more fields behind."""
    block = ctypes.create_string_buffer(ctypes.sizeof(struct) + _SLACK_BYTES)
    return struct.from_buffer(block)


def struct_fields(struct: ctypes.Structure) -> dict[str, Any]:
    """A struct's fields by name: numbers, and texts for arrays of characters."""
    values = {field[0]: getattr(struct, field[0]) for field in struct._fields_}
    return {name: _text(value) if isinstance(value, bytes) else value for name, value in values.items()}


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")


# the expert store


class LoadParamsStruct(ctypes.Structure):
    """``struct mobile_load_params``."""

    _fields_ = [
        ("budget_bytes", ctypes.c_uint64),
        ("n_io_threads", ctypes.c_int32),
        ("eviction", ctypes.c_int32),
        ("io", ctypes.c_int32),
        ("on_host", ctypes.c_int32),
        ("prefault", ctypes.c_int32),
        ("n_at_once", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model's expert store; bytes."""

    expert_bytes: int
    budget_bytes: int
    budget_min_bytes: int
    budget_all_bytes: int
    n_layer: int
    n_layer_moe: int
    n_expert: int
    n_expert_used: int
    direct_io: int
    eviction: int


class ModelInfoStruct(ctypes.Structure):
    """``struct mobile_model_info``."""

    _fields_ = [
        ("expert_bytes", ctypes.c_uint64),
        ("budget_bytes", ctypes.c_uint64),
        ("budget_min_bytes", ctypes.c_uint64),
        ("budget_all_bytes", ctypes.c_uint64),
        ("n_layer", ctypes.c_int32),
        ("n_layer_moe", ctypes.c_int32),
        ("n_expert", ctypes.c_int32),
        ("n_expert_used", ctypes.c_int32),
        ("direct_io", ctypes.c_int32),
        ("eviction", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Counters:
    """What the store did since the last reset; ``resident_bytes`` is the present state.

    Bytes, microseconds and counts, as in mobile.h.
    """

    n_tokens: int = 0
    n_tokens_little: int = 0
    n_hits: int = 0
    n_misses: int = 0
    n_evictions: int = 0
    n_prefetched: int = 0
    n_prefetch_hits: int = 0
    bytes_read: int = 0
    bytes_read_demand: int = 0
    bytes_routed: int = 0
    stall_us: int = 0
    resident_bytes: int = 0
    resident_bytes_peak: int = 0

    def __add__(self, later: Counters) -> Counters:
        """Both periods together; ``later`` has the present state."""
        sums = {name: getattr(self, name) + getattr(later, name) for name in self.__dataclass_fields__}
        sums["resident_bytes"] = later.resident_bytes
        sums["resident_bytes_peak"] = max(self.resident_bytes_peak, later.resident_bytes_peak)
        return Counters(**sums)


class CountersStruct(ctypes.Structure):
    """``struct mobile_counters``."""

    _fields_ = [(name, ctypes.c_uint64) for name in Counters.__dataclass_fields__]


class RoutedStruct(ctypes.Structure):
    """``struct mobile_routed``."""

    _fields_ = [(name, ctypes.c_int32) for name in ("step", "layer", "expert", "missed")]


# what is moved ahead of need

_PREFETCH_COUNTS = (
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
PREFETCH_STATES = (
    "mode",
    "by_router",
    "next_on",
    "masked_on",
    "next_permille",
    "masked_permille",
)


@dataclass(frozen=True)
class PrefetchCounters:
    """What was moved ahead since the last reset of the counters, and what is in use now.

    Counts, bytes and microseconds as in mobile.h: ``n_queued`` experts that a little pass left out were read,
    of which ``n_used`` were needed before they left memory, ``n_wasted`` left it unused; ``n_unused`` are
    there still. ``saved_us`` is an estimate: the bytes that had arrived when they were needed, times the
    stall that a byte read on demand cost. Uploads to a device, which ``DeviceCounters`` counts, are tried:
    ``next_permille`` is the time of a pass with predicted ones over one without, as measured last; 0: not
    yet; ``masked_permille`` the same for what little passes left out.
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

    def to_dict(self) -> dict[str, Any]:
        """For ``Model.stats()``: ratios are None until they were measured."""
        return {
            "mode": {number: name for name, number in PREFETCH.items()}[self.mode],
            "predictor": "router" if self.by_router else "transitions",
            "next_layer_uploads_on": bool(self.next_on),
            "little_pass_uploads_on": bool(self.masked_on),
            "next_layer_uploads_time_ratio": self.next_permille / 1000 or None,
            "little_pass_uploads_time_ratio": self.masked_permille / 1000 or None,
            **{name: getattr(self, name) for name in _PREFETCH_COUNTS},
        }


class PrefetchCountersStruct(ctypes.Structure):
    """``struct mobile_prefetch_counters``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _PREFETCH_COUNTS),
        *((name, ctypes.c_int32) for name in PREFETCH_STATES),
    ]


@dataclass(frozen=True)
class WarmCounters:
    """What became of the warm set since the model was loaded: experts or segments, and bytes.

    Of ``n_read``, which counts also those on their way, ``n_used`` were needed before they left memory and
    ``n_wasted`` left it unused; ``n_left`` are not begun yet.
    """

    n_read: int = 0
    n_used: int = 0
    n_wasted: int = 0
    n_left: int = 0
    bytes_read: int = 0


class WarmCountersStruct(ctypes.Structure):
    """``struct mobile_warm_counters``."""

    _fields_ = [(name, ctypes.c_uint64) for name in WarmCounters.__dataclass_fields__]


# the ladder of lossy rules


class LossParamsStruct(ctypes.Structure):
    """``struct mobile_loss_params``."""

    _fields_ = [
        ("drop", ctypes.c_float),
        ("little_on_miss", ctypes.c_int32),
        ("again_tokens", ctypes.c_int32),
        ("substitute", ctypes.c_int32),
        ("keep", ctypes.c_int32),
        ("substitutes_max", ctypes.c_int32),
        ("tau", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("eta", ctypes.c_float),
        ("margin", ctypes.c_float),
        ("prior", ctypes.c_float),
        ("admit", ctypes.c_int32),
        ("prompt_drop", ctypes.c_float),
        ("partial", ctypes.c_float),
    ]


@dataclass(frozen=True)
class LossCounters:
    """What the lossy rules did since the last reset: sums over layers, and over tokens that they might touch.

    Of ``n_missing`` experts that were asked for and not there, ``n_dropped``, ``n_left_out`` (by
    little-on-miss) and ``n_substituted`` were not read; ``n_again`` were, since they were asked for again.
    ``moved_weight`` sums the shares of the tokens' weights that this touched, over ``n_layers`` (token,
    layer) pairs. ``n_admitted`` displaced experts were read while the disk was idle. ``n_partial`` missing
    ones were computed with the segments that were there.
    """

    n_layers: int = 0
    n_missing: int = 0
    n_dropped: int = 0
    n_left_out: int = 0
    n_substituted: int = 0
    n_again: int = 0
    n_admitted: int = 0
    n_admit_left: int = 0
    bytes_admitted: int = 0
    moved_weight: float = 0.0
    n_partial: int = 0

    def __add__(self, other: LossCounters) -> LossCounters:
        """Both together."""
        return LossCounters(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )


class LossCountersStruct(ctypes.Structure):
    """``struct mobile_loss_counters``."""

    _fields_ = [
        (name, ctypes.c_double if name == "moved_weight" else ctypes.c_uint64)
        for name in LossCounters.__dataclass_fields__
    ]


# the device tier


class DeviceParamsStruct(ctypes.Structure):
    """``struct mobile_device_params``."""

    _fields_ = [
        ("budget_bytes", ctypes.c_uint64),
        ("miss", ctypes.c_int32),
        ("placement", ctypes.c_int32),
        ("eviction", ctypes.c_int32),
        ("n_batch_max", ctypes.c_int32),
        ("n_uploads", ctypes.c_int32),
        ("poison", ctypes.c_int32),
        ("reserved", ctypes.c_int32 * 2),
    ]


@dataclass(frozen=True)
class DeviceInfo:
    """A device of a started tier, which holds layers with routed experts: its slot pool, and its memory now.

    Bytes; free and total by its driver. ``devices.Device`` is another thing: what ggml lists before a load.
    ``pool_bytes`` is what the slots take, ``expert_bytes`` what all experts of its ``n_layers`` would.
    ``upload_us`` is the measured time of an expert's upload that is waited for, ``stall_us`` how long one in
    the background holds up the computation; 0 before the slots are made.
    """

    name: str
    description: str
    free_bytes: int
    total_bytes: int
    pool_bytes: int
    expert_bytes: int
    n_layers: int
    n_slots: int
    is_gpu: int
    is_async: int
    upload_us: float = 0.0
    stall_us: float = 0.0


class DeviceInfoStruct(ctypes.Structure):
    """``struct mobile_device_info``."""

    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("description", ctypes.c_char * 128),
        ("free_bytes", ctypes.c_uint64),
        ("total_bytes", ctypes.c_uint64),
        ("pool_bytes", ctypes.c_uint64),
        ("expert_bytes", ctypes.c_uint64),
        ("n_layers", ctypes.c_int32),
        ("n_slots", ctypes.c_int32),
        ("is_gpu", ctypes.c_int32),
        ("is_async", ctypes.c_int32),
        ("upload_us", ctypes.c_double),
        ("stall_us", ctypes.c_double),
    ]


@dataclass(frozen=True)
class DeviceCounters:
    """What the device tier did since the last reset; ``resident_bytes`` is the present state.

    Bytes, microseconds and counts, as in mobile.h. ``n_ahead`` experts were uploaded because of a hint; of
    all such ``n_ahead_unused`` are in slots at present without a use yet.
    """

    n_hits: int = 0
    n_misses: int = 0
    n_fetched: int = 0
    n_cpu: int = 0
    n_admitted: int = 0
    n_evictions: int = 0
    n_wasted: int = 0
    bytes_uploaded: int = 0
    bytes_uploaded_background: int = 0
    bytes_wasted: int = 0
    upload_us: int = 0
    cpu_us: int = 0
    resident_bytes: int = 0
    resident_bytes_peak: int = 0
    n_ahead: int = 0
    n_ahead_used: int = 0
    n_ahead_wasted: int = 0
    n_ahead_unused: int = 0
    n_ahead_dropped: int = 0
    bytes_uploaded_ahead: int = 0
    bytes_ahead_wasted: int = 0
    ahead_saved_us: int = 0

    def __add__(self, later: DeviceCounters) -> DeviceCounters:
        """Both periods together; ``later`` has the present state."""
        sums = {name: getattr(self, name) + getattr(later, name) for name in self.__dataclass_fields__}
        sums["resident_bytes"] = later.resident_bytes
        sums["n_ahead_unused"] = later.n_ahead_unused
        sums["resident_bytes_peak"] = max(self.resident_bytes_peak, later.resident_bytes_peak)
        return DeviceCounters(**sums)


class DeviceCountersStruct(ctypes.Structure):
    """``struct mobile_device_counters``."""

    _fields_ = [(name, ctypes.c_uint64) for name in DeviceCounters.__dataclass_fields__]


# what is observed: pointers into the engine, copied by observe.py


class ObservedInputStruct(ctypes.Structure):
    """``struct mobile_observed_input``."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("n_row", ctypes.c_int64),
        ("n_mat", ctypes.c_int64),
        ("n_count", ctypes.c_int64),
        ("sum2", ctypes.POINTER(ctypes.c_float)),
        ("counts", ctypes.POINTER(ctypes.c_int64)),
    ]


class ObservedRouteStruct(ctypes.Structure):
    """``struct mobile_observed_route``."""

    _fields_ = [
        ("layer", ctypes.c_int32),
        ("n_used", ctypes.c_int32),
        ("n_tokens", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("ids", ctypes.POINTER(ctypes.c_int32)),
        ("weights", ctypes.POINTER(ctypes.c_float)),
    ]


class ObservedLittleStruct(ctypes.Structure):
    """``struct mobile_observed_little``."""

    _fields_ = [
        ("layer", ctypes.c_int32),
        ("way", ctypes.c_int32),
        ("n_embd", ctypes.c_int64),
        ("n_tokens", ctypes.c_int64),
        ("big", ctypes.POINTER(ctypes.c_double)),
        ("big2", ctypes.POINTER(ctypes.c_double)),
        ("little", ctypes.POINTER(ctypes.c_double)),
        ("little2", ctypes.POINTER(ctypes.c_double)),
    ]
