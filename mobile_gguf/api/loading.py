"""Opening a model: engine or stock library, budget, and every failure as one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mobile_gguf.device.tier import DeviceRequest, request_devices, start_tier
from mobile_gguf.engine.binding import Engine, find_engine, needs_engine
from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.engine.held_interrupts import held_interrupts
from mobile_gguf.engine.log import capture_log, clear_errors, last_errors
from mobile_gguf.engine.prefetch import holder, set_prefetch
from mobile_gguf.engine.rpc import clear_loss, last_loss
from mobile_gguf.errors import BudgetError, EngineError, MobileError, ModelFormatError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import BudgetPlan, context_size, estimate_demand, plan_budget
from mobile_gguf.memory.device_budget import host_share
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.memory.threads import default_threads
from mobile_gguf.options import LoadOptions
from mobile_gguf.progress import Progress
from mobile_gguf.sizes import parse_size

if TYPE_CHECKING:
    from mobile_gguf.generate.llama import MobileLlama


def open_backend(
    info: GgufInfo, options: LoadOptions, progress: Progress | None = None, **more: Any
) -> tuple[MobileLlama, list[str]]:
    """Load a model as ``options`` say; returns it and what the user must know about it.

    Experts go into the engine's store under the budget. Without experts, or on a stock library, the
    model is loaded as llama.cpp does it, mapped. With a device all else goes there, and experts into slots.
    ``progress`` is called with a phase and the share done; what it raises ends the loading. ``more`` goes
    to llama-cpp-python's Llama. Raises BudgetError, ModelFormatError, EngineError.
    """
    engine = find_engine()
    size = parse_size(options.ram_budget)
    if engine is None and info.is_moe and not size.is_auto:
        raise needs_engine("a --ram-budget")
    if engine is None and not info.stock:
        raise needs_engine(
            f"{info.path} ({info.layout}; `mobile-gguf convert --export` makes a file for stock llama.cpp)"
        )
    capture_log(options.verbose)
    if progress is not None:
        more["progress"] = progress
    notices: list[str] = []
    n_ctx = context_size(info, options.n_ctx)
    if n_ctx > info.n_ctx_train > 0:
        notices.append(f"a context of {n_ctx} is more than the model was trained with, {info.n_ctx_train}")
    if not info.is_moe:
        ignored = "" if size.is_auto else "; --ram-budget has no effect"
        notices.append(f"{info.path.name} has no experts: it runs as an ordinary dense model{ignored}")
    elif engine is None:
        notices.append("stock llama.cpp: experts are mapped, not budgeted; run `mobile-gguf engine build`")
    request, remarks = request_devices(info, options, n_ctx, engine)
    notices += remarks
    if request is not None and not request.is_asked:
        try:
            llama = _open(info, options, n_ctx, engine, request, notices, more)
        except (EngineError, ModelFormatError, BudgetError) as error:
            # What nobody asked for must not keep a model from running.
            notices.append(f"the model stays on the host: {error}")
            request = None
        else:
            return llama, notices
    return _open(info, options, n_ctx, engine, request, notices, more), notices


def _open(
    info: GgufInfo,
    options: LoadOptions,
    n_ctx: int,
    engine: Engine | None,
    request: DeviceRequest | None,
    notices: list[str],
    more: dict[str, Any],
) -> MobileLlama:
    """Load a model on the requested devices, None for the host alone; adds to ``notices``."""
    more = more | {"devices": None if request is None else request.devices}
    if engine is None or not info.is_moe:
        return _construct(info, options, n_ctx, engine, use_mmap=True, **more)
    from mobile_gguf.generate.head import read_head

    head = read_head(info)
    plan = plan_for(info, options, n_ctx, request)
    if plan.warning:
        notices.append(plan.warning)
    engine.set_load_params(
        budget_bytes=plan.budget_bytes,
        io_threads=options.io_threads,
        eviction=options.eviction,
        io=options.io,
        on_host=request is not None,
    )
    try:
        llama = _construct(info, options, n_ctx, engine, use_mmap=False, **more)
    finally:
        engine.clear_load_params()
    llama.head = head
    if llama.store is None:
        notices.append(
            f"the engine cannot hold the experts of a {info.architecture} model: no budget, only mode exact"
        )
        return llama
    try:
        set_prefetch(engine, llama.ctx, options.prefetch)
        if request is not None:
            calls = DeviceCalls(engine, llama.ctx)
            host_bytes = plan.budget_bytes or plan.expert_bytes
            hold = holder(engine, llama.ctx, options.prefetch)
            llama.device, remarks = start_tier(calls, info, options, request, host_bytes, hold)
            notices += remarks
    except BaseException:
        _discard(llama)
        raise
    return llama


def plan_for(
    info: GgufInfo, options: LoadOptions, n_ctx: int, request: DeviceRequest | None = None
) -> BudgetPlan:
    """The host tier's expert budget for these options on this machine, now; ``request``: with devices."""
    demand = estimate_demand(info, n_ctx=n_ctx, n_ubatch=options.n_ubatch, flash_attn=options.flash_attn)
    if request is not None and not request.shares_host_memory:
        demand = host_share(demand, info)
    return plan_budget(parse_size(options.ram_budget), info, demand, read_memory())


def _construct(
    info: GgufInfo,
    options: LoadOptions,
    n_ctx: int,
    engine: Engine | None,
    *,
    use_mmap: bool,
    progress: Progress | None = None,
    **more: Any,
) -> MobileLlama:
    """Make the Llama; ``more`` holds ``devices``, None for the host alone, and keywords of its own."""
    from jinja2 import TemplateError

    from mobile_gguf.generate.llama import MobileLlama

    threads, threads_batch = default_threads()
    arguments: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_batch": options.n_batch,
        "n_ubatch": options.n_ubatch,
        "n_threads": options.threads or threads,
        "n_threads_batch": options.threads_batch or options.threads or threads_batch,
        "flash_attn": options.flash_attn,
        "use_mmap": use_mmap,
        "verbose": options.verbose,
        **more,
    }
    watch = _LoadWatch(progress) if progress is not None else None
    clear_errors()
    clear_loss()
    # Made in two steps, so that what a failed constructor has already loaded is freed at once and
    # not when the traceback is.
    llama = MobileLlama.__new__(MobileLlama)
    try:
        with held_interrupts() as interrupted:
            if watch is not None:
                watch.interrupted = interrupted
            llama.__init__(str(info.path), engine=engine, keep_loading=watch, **arguments)
    except TemplateError as error:
        _discard(llama)
        raise ModelFormatError(f"{info.path} cannot be used: its chat template is broken: {error}") from None
    except (ValueError, RuntimeError, OSError, AssertionError, MemoryError) as error:
        reason = engine.last_error() if engine is not None else ""
        _discard(llama)
        if watch is not None and watch.error is not None:
            raise watch.error from None
        raise _load_error(info, n_ctx, error, reason) from None
    except BaseException:
        _discard(llama)
        raise
    return llama


class _LoadWatch:
    """llama.cpp's question while it loads, whether to go on; remembers what the answer raised."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.error: BaseException | None = None
        self.interrupted: Callable[[], bool] = lambda: False

    def __call__(self, share: float) -> bool:
        try:
            self._progress("loading", share)
        except BaseException as error:  # must not pass through C
            self.error = error
        return self.error is None and not self.interrupted()


def _discard(llama: MobileLlama) -> None:
    if hasattr(llama, "_stack"):
        llama.close()


def _load_error(info: GgufInfo, n_ctx: int, error: BaseException, reason: str) -> MobileError:
    logged = last_errors()
    lost = last_loss()
    if lost:
        return EngineError(f"{info.path} cannot be loaded: {lost}")
    if reason:
        kind = BudgetError if "budget" in reason else EngineError
        return kind(f"{info.path} cannot be loaded: {reason}")
    if "llama_context" in str(error):
        return EngineError(
            f"no context of {n_ctx} tokens for {info.path}: {logged or error}; try a smaller --ctx-size"
        )
    return ModelFormatError(f"{info.path} cannot be loaded: {logged or error}")
