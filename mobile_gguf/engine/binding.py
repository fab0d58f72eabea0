"""The engine's C API (``patches/src/mobile.h``, ``mobile-mtp.h``) as calls on llama-cpp-python's library.

llama-cpp-python loads the library; here the ``mobile_*`` symbols that our build adds are bound to
it. A stock build has none: ``find_engine`` then returns None, and what needs the engine says how to
build it. The structs below mirror the header field by field; ``ABI_VERSION`` guards them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from mobile_gguf.errors import (
    BudgetError,
    EngineError,
    EngineMemoryError,
    ExpertReadError,
    MobileError,
    UsageError,
)
from mobile_gguf.options.words import DEFAULT_EVICTION

from .forks import abandon_in_children, forked, let_children_load
from .structs import (
    ABI_VERSION,
    EVICTION,
    GUESSED,
    IO,
    Counters,
    CountersStruct,
    DeviceParamsStruct,
    LoadParamsStruct,
    LossParamsStruct,
    ModelInfo,
    ModelInfoStruct,
    struct_fields,
    with_slack,
)

BUILD_HINT = "run `mobile-gguf engine build`"

# ggml_log_callback; kept for as long as the library, which calls it
_unheard = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
_with_backends: list[Any] = []  # libraries that have loaded theirs

_STATUS_ERRORS: dict[int, type[MobileError]] = {
    -1: UsageError,
    -3: BudgetError,
    -4: ExpertReadError,
    -5: EngineMemoryError,
}


class Engine:
    """The bound C API. ``model`` and ``ctx`` are the addresses that llama-cpp-python holds."""

    def __init__(self, library: Any, path: str = "the engine library") -> None:
        self._library = library
        self.path = path
        self._functions: dict[str, Any] = {}
        self._bind()
        self._is_forked = False
        abandon_in_children(self)

    def _bind(self) -> None:
        from llama_cpp import llama_cpp

        address, text, status, n = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "last_error": (text, []),
            "load_default_params": (LoadParamsStruct, []),
            "load_set_params": (status, [address]),
            "model_get_info": (status, [address, address]),
            "model_get_n_segments": (n, [address]),
            "model_get_residency": (status, [address, address, ctypes.c_size_t]),
            "set_n_expert_used": (status, [address, n]),
            "set_batch_n_expert_used": (status, [address, address, n]),
            "set_mass": (status, [address, n]),
            "set_correction": (status, [address, n, address, address, n, n]),
            "set_corrected": (status, [address, ctypes.c_bool]),
            "prefetch_masked": (n, [address]),
            "set_prefetch": (status, [address, n]),
            "set_predictor": (status, [address, n]),
            "get_prefetch_counters": (status, [address, address]),
            "get_worth": (n, [address, address, n]),
            "warm": (n, [address, address, n]),
            "get_warm_counters": (status, [address, address]),
            "set_split": (status, [address, ctypes.c_bool, address, address, n]),
            "loss_default_params": (LossParamsStruct, []),
            "set_loss": (status, [address, address]),
            "set_lossy": (status, [address, ctypes.c_bool]),
            "set_batch_lossy": (status, [address, address, n]),
            "set_buddies": (status, [address, address, address, address, n, n, n]),
            "set_loss_residency": (status, [address, address, ctypes.c_size_t]),
            "get_loss_counters": (status, [address, address]),
            "get_token_loss": (status, [address, ctypes.c_int32, address]),
            "get_counters": (status, [address, address]),
            "reset_counters": (status, [address]),
            "context_error": (text, [address]),
            "trace_start": (status, [address, text]),
            "trace_stop": (status, [address]),
            "routed_watch": (status, [address, ctypes.c_bool]),
            "routed_read": (n, [address, ctypes.c_uint64, address, n, address, address]),
            "set_replay": (status, [address, address, n, n, n]),
            "set_precise": (status, [ctypes.c_bool]),
            "set_row_exact": (status, [address, ctypes.c_bool]),
            "set_guessed": (status, [address, ctypes.c_int32]),
            "refuse": (status, [address, address, n]),
            "mtp_set_states": (status, [address, ctypes.c_bool, ctypes.c_bool]),
            "mtp_get_states": (status, [address, n, n, address]),
            "mtp_decode": (status, [address, llama_cpp.llama_batch, n, address]),
            "tokenize": (status, [address, text, n, address, n, ctypes.c_bool, ctypes.c_bool, address]),
            "token_to_piece": (status, [address, n, address, n, ctypes.c_bool, address]),
            "decode": (status, [address, llama_cpp.llama_batch, address]),
            "sample": (status, [address, address, n, address]),
            "sample_among": (status, [address, address, n, address, n, address]),
            "observe_start": (status, [address, n]),
            "observe_stop": (status, [address]),
            "observe_n_inputs": (n, [address]),
            "observe_get_input": (status, [address, n, address]),
            "observe_n_routes": (n, [address]),
            "observe_get_route": (status, [address, n, address]),
            "observe_clear_routes": (status, [address]),
            "observe_set_little": (status, [address, address, address, n]),
            "observe_n_little": (n, [address]),
            "observe_get_little": (status, [address, n, address]),
            "device_default_params": (DeviceParamsStruct, []),
            "device_start": (status, [address, address]),
            "device_stop": (status, [address]),
            "device_set_placement": (status, [address, n]),
            "device_set_miss": (status, [address, n]),
            "device_count": (n, [address]),
            "device_get_info": (status, [address, n, address]),
            "device_get_counters": (status, [address, address]),
            "device_get_residency": (status, [address, address, ctypes.c_size_t]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._library, f"mobile_{name}")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def last_error(self) -> str:
        """The text of this thread's last failed call; empty if none."""
        return _text(self._call("last_error"))

    def context_error(self, ctx: int) -> str:
        """Why the last decode on ``ctx`` failed inside the expert store; empty if it did not."""
        return _text(self._call("context_error", ctx))

    def set_load_params(
        self,
        *,
        budget_bytes: int,
        io_threads: int | None = None,
        eviction: str = DEFAULT_EVICTION,
        io: str = "auto",
        on_host: bool = False,
        prefault: bool = False,
        at_once: int = 0,
    ) -> None:
        """Make the next model load on this thread use the expert store; 0 bytes keeps every expert.

        ``on_host`` keeps routed experts in host memory even where other weights go to a device. ``prefault``
        lets idle I/O threads take the budget's memory before it is needed. ``at_once`` makes a budget legal
        that holds so many experts, or segments, of a layer: a pass that asks a layer for more fails.
        """
        params = with_slack(LoadParamsStruct)
        defaults = self._call("load_default_params")
        params.budget_bytes = budget_bytes
        params.n_io_threads = io_threads if io_threads is not None else defaults.n_io_threads
        params.eviction = choice("eviction", EVICTION, eviction)
        params.io = choice("io", IO, io)
        params.on_host = on_host
        params.prefault = prefault
        params.n_at_once = at_once
        self._check(self._call("load_set_params", ctypes.byref(params)), "setting the load parameters")

    def clear_load_params(self) -> None:
        """Take back load parameters that no load has consumed."""
        self._call("load_set_params", None)

    def model_info(self, model: int) -> ModelInfo | None:
        """The model's expert store, or None if it was loaded without one."""
        info = with_slack(ModelInfoStruct)
        if self._call("model_get_info", model, ctypes.byref(info)) != 0:
            return None
        return ModelInfo(**struct_fields(info))

    def n_segments(self, model: int) -> int:
        """Segments in which the store holds each expert; 1 if they are whole, or there is no store."""
        return max(1, self._call("model_get_n_segments", model))

    def residency(self, model: int, n_layer: int, n_expert: int) -> list[bytes]:
        """One byte per expert (NOT_RESIDENT, LOADING, RESIDENT), a row per layer; dense layers are 0."""
        state = (ctypes.c_uint8 * (n_layer * n_expert))()
        self._check(self._call("model_get_residency", model, state, len(state)), "reading residency")
        flat = bytes(state)
        return [flat[start : start + n_expert] for start in range(0, len(flat), n_expert)]

    def set_n_expert_used(self, ctx: int, k: int) -> None:
        """From the next decode on use at most ``k`` routed experts a token; 0 means all of the top-k."""
        self._check(self._call("set_n_expert_used", ctx, k), f"using {k} experts")

    def set_batch_n_expert_used(self, ctx: int, k: Sequence[int]) -> None:
        """The same for the next decode only, one number per token of its batch."""
        array = (ctypes.c_int32 * len(k))(*k)
        self._check(self._call("set_batch_n_expert_used", ctx, array, len(k)), "using experts per token")

    def prefetch_masked(self, ctx: int) -> int:
        """Start reading what the last little pass left out; returns how many reads were queued.

        A hint: an error is no reason to stop, for the pass that needs the experts will report it.
        """
        return max(0, self._call("prefetch_masked", ctx))

    def counters(self, ctx: int) -> Counters:
        """What the store did since the last reset."""
        counters = with_slack(CountersStruct)
        self._check(self._call("get_counters", ctx, ctypes.byref(counters)), "reading counters")
        return Counters(**struct_fields(counters))

    def reset_counters(self, ctx: int) -> None:
        """Start counting anew; the peak starts from what is resident."""
        self._check(self._call("reset_counters", ctx), "resetting counters")

    def set_precise(self, on: bool) -> None:
        """Multiply F16 and BF16 matrices by float32 activations, in every model of this process."""
        self._check(self._call("set_precise", on), "switching to float32 activations")

    def set_row_exact(self, ctx: int, on: bool) -> None:
        """Whether each token of the passes to come has the bits that it has alone, on the CPU."""
        self._check(self._call("set_row_exact", ctx, on), "choosing the kernels of single rows")

    def set_guessed(self, ctx: int, guessed: str) -> None:
        """Which tokens of the passes to come are guessed, a name of GUESSED.

        ``none``: all are of the text. ``draft``: of the text are those that ``refuse`` does not name.
        ``source``: none is, they are run for a draft.
        """
        self._check(self._call("set_guessed", ctx, GUESSED[guessed]), "keeping what tokens ask for")

    def refuse(self, ctx: int, tokens: Sequence[int]) -> None:
        """Have tokens of the last decode, by their places in its batch, be none of the text.

        A hint: an error, as for a decode of several micro-batches, only leaves them counted.
        """
        self._call("refuse", ctx, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens))

    def checked(self, name: str, doing: str, *arguments: Any) -> int:
        """Call ``mobile_NAME`` and return its count or status; raises if that is negative."""
        result = self._call(name, *arguments)
        self._check(result, doing)
        return result

    def default_device_params(self) -> DeviceParamsStruct:
        """The engine's own settings of a device tier."""
        return self._call("device_default_params")

    def _abandon(self) -> None:
        """In a forked child: no more calls."""
        self._is_forked = True

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._is_forked:
            raise forked()
        return self._functions[name](*arguments)

    def _check(self, status: int, doing: str) -> None:
        if status < 0:
            error = _STATUS_ERRORS.get(status, EngineError)
            raise error(self.last_error() or f"{doing} failed with engine status {status}")


def find_engine() -> Engine | None:
    """The engine in llama-cpp-python's library; None if that library is a stock build.

    Raises EngineError if llama-cpp-python is missing, cannot be loaded, or has another ABI.
    """
    library, path = load_library()
    version = getattr(library, "mobile_abi_version", None)
    if version is None:
        return None
    version.restype, version.argtypes = ctypes.c_int32, []
    if version() != ABI_VERSION:
        raise EngineError(
            f"the engine at {path} has ABI version {version()}, this package needs {ABI_VERSION}: "
            "run `mobile-gguf engine build --force`, or install the engine's wheel of this package's release"
        )
    try:
        return Engine(library, path)
    except AttributeError as error:
        raise EngineError(
            f"the engine at {path} is incomplete ({error}): run `mobile-gguf engine build --force`"
        ) from None


def load_library() -> tuple[Any, str]:
    """llama-cpp-python's shared library and its path, loading it if need be.

    Raises EngineError if llama-cpp-python is not installed or its library does not load.
    """
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise EngineError(f"llama-cpp-python cannot be imported ({error}): {BUILD_HINT}") from None
    except (OSError, RuntimeError) as error:
        raise EngineError(f"llama-cpp-python's library does not load ({error}): {BUILD_HINT}") from None
    library = llama_cpp._lib
    let_children_load(library)
    load_backends(library)
    return library, str(getattr(library, "_name", "the engine library"))


def load_backends(library: Any) -> None:
    """Have ggml choose its backends, once, where they are libraries of their own.

    llama.cpp does it when it is first asked for one; ggml's registry alone would have none. It logs which
    ones it took, and nobody has said yet who reads that.
    """
    asks = getattr(library, "llama_supports_rpc", None)
    if asks is None or getattr(library, "ggml_backend_cpu_init", None) is not None:
        return
    if not any(known is library for known in _with_backends):
        _with_backends.append(library)
        library.llama_log_set(_unheard, None)
    asks()


def bind_function(library: Any, name: str, result: Any, arguments: list[Any]) -> Callable[..., Any]:
    """A function of the library with its types; raises EngineError if there is none of that name."""
    function = getattr(library, name, None)
    if function is None:
        raise EngineError(f"this engine has no {name}: run `mobile-gguf engine build --force`")
    function.restype, function.argtypes = result, arguments
    return function


def bind_backend_function(library: Any, backend: str, name: str, result: Any, arguments: list[Any]) -> Any:
    """A function of a backend, which may be a library of its own; raises EngineError as ``bind_function``."""
    if getattr(library, name, None) is not None:
        return bind_function(library, name, result, arguments)
    address, text = ctypes.c_void_p, ctypes.c_char_p
    find = bind_function(library, "ggml_backend_reg_by_name", address, [text])
    ask = bind_function(library, "ggml_backend_reg_get_proc_address", address, [address, text])
    registry = find(backend.encode())
    found = ask(registry, name.encode()) if registry else None
    if not found:
        raise EngineError(f"this engine has no {name}: run `mobile-gguf engine build --force`")
    return ctypes.CFUNCTYPE(result, *arguments)(found)


def needs_engine(feature: str) -> EngineError:
    """The error for a feature that a stock llama-cpp-python does not have."""
    return EngineError(f"{feature} needs the mobile-gguf engine, and this is a stock llama.cpp: {BUILD_HINT}")


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")


def choice(name: str, choices: dict[str, int], value: str) -> int:
    """The engine's number for a named choice; raises UsageError naming those that there are."""
    if value not in choices:
        *others, last = choices
        raise UsageError(f"{name} is {value!r}: choose {', '.join(others)} or {last}")
    return choices[value]
