"""Opening a model: engine or stock library, budget, and every failure as one clear error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mobile_gguf.device.tier import devices_for, start_tier
from mobile_gguf.engine.binding import Engine, find_engine, needs_engine
from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.engine.guarded import NoContextError
from mobile_gguf.engine.held_interrupts import held_interrupts
from mobile_gguf.engine.log import capture_log, clear_errors, last_errors
from mobile_gguf.engine.prefetch import holder, set_prefetch
from mobile_gguf.engine.rpc import clear_loss, last_loss
from mobile_gguf.engine.split import set_split
from mobile_gguf.engine.trial import try_file
from mobile_gguf.engine.warm import WarmSet
from mobile_gguf.errors import BudgetError, EngineError, MobileError, ModelFormatError
from mobile_gguf.gguf.caches import F16_KV
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.block import block_to_load
from mobile_gguf.memory.buffers import with_buffers, with_settled_context
from mobile_gguf.memory.fit import Asked, Fit, asked_of, fit_model
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.memory.microbatch import DEFAULT_UBATCH
from mobile_gguf.memory.promise import cache_bytes, promised
from mobile_gguf.memory.sequences import sequences_of
from mobile_gguf.memory.threads import bounded_threads, default_threads
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import AUTO_PARALLEL, AUTO_UBATCH, OFF, ON, RAM
from mobile_gguf.plan.split_file import split_plan_for
from mobile_gguf.progress import Progress

from .session_cache import sessions_of

if TYPE_CHECKING:
    from mobile_gguf.generate.llama import MobileLlama


def open_backend(
    info: GgufInfo, options: LoadOptions, progress: Progress | None = None, **more: Any
) -> tuple[MobileLlama, list[str]]:
    """Load a model as ``options`` say; returns it and what the user must know about it.

    Experts go into the engine's store under the budget. Without experts, or on a stock library, the
    model is loaded as llama.cpp does it, mapped. With a device all else goes there, and experts into slots.
    ``progress`` is called with a phase and the share done; what it raises ends the loading. ``more`` goes
    to generate/context/native.py's Native. Raises BudgetError, ModelFormatError, EngineError.
    """
    engine = find_engine()
    asked = asked_of(info, options)
    if engine is None and info.is_moe and not asked.ram.is_auto:
        raise needs_engine("a --ram-budget")
    if engine is None and not options.memory.is_auto:
        raise needs_engine("--memory")
    if engine is None and not info.stock:
        raise needs_engine(
            f"{info.path} ({info.layout}; `mobile-gguf convert --export` makes a file for stock llama.cpp)"
        )
    capture_log(options.verbose)

    def keep_on() -> None:
        if progress is not None:
            progress("loading", 0.0)

    if engine is not None:
        try_file(engine, info.path, info.files, keep_on)
        asked = with_buffers(engine, info, asked, keep_on)
    if progress is not None:
        more["progress"] = progress
    notices: list[str] = []
    options = _with_threads(options, notices)
    if (remark := sequences_of(info, options)[1]) and options.parallel is not None:
        notices.append(remark)
    n_ctx = asked.n_ctx
    if n_ctx > info.n_ctx_train > 0:
        notices.append(f"a context of {n_ctx} is more than the model was trained with, {info.n_ctx_train}")
    if not info.is_moe:
        ignored = "" if asked.ram.is_auto else "; --ram-budget has no effect"
        notices.append(f"{info.path.name} has no experts: it runs as an ordinary dense model{ignored}")
    elif engine is None:
        notices.append("stock llama.cpp: experts are mapped, not budgeted; run `mobile-gguf engine build`")
    devices, remarks = devices_for(options, asked, engine)
    notices += remarks
    memory = promised(options, read_memory())
    if engine is not None and asked.other_contexts:
        asked = with_settled_context(
            info, asked, memory, devices, lambda one: with_buffers(engine, info, one, keep_on)
        )
    planned, why_no_mtp = block_to_load(info, options, engine, devices, asked, memory, keep_on)
    more["mtp"] = planned.runs_mtp
    fit = fit_model(planned, asked, memory, devices) if engine is not None else None
    if fit is not None and fit.devices and not asked.insists:
        try:
            llama, remarks = _open(info, options, fit.asked, engine, fit, more)
        except (EngineError, ModelFormatError, BudgetError) as error:
            # What nobody asked for must not keep a model from running.
            notices.append(f"the model stays on the host: {error}")
            fit = fit_model(info, asked, memory)
        else:
            llama.fit, llama.why_no_mtp = fit, why_no_mtp
            return llama, notices + remarks
    llama, remarks = _open(info, options, asked if fit is None else fit.asked, engine, fit, more)
    llama.fit, llama.why_no_mtp = fit, why_no_mtp
    return llama, notices + remarks


def _with_threads(options: LoadOptions, notices: list[str]) -> LoadOptions:
    processors = default_threads()[1]
    threads, said = bounded_threads(options.threads, processors)
    threads_batch, also_said = bounded_threads(options.threads_batch, processors)
    notices += dict.fromkeys(filter(None, (said, also_said)))
    return replace(options, threads=threads, threads_batch=threads_batch)


def _open(
    info: GgufInfo,
    options: LoadOptions,
    asked: Asked,
    engine: Engine | None,
    fit: Fit | None,
    more: dict[str, Any],
) -> tuple[MobileLlama, list[str]]:
    """Load a model where ``fit`` puts it, None: mapped by a stock library; returns it and notices."""
    notices = [] if fit is None else [*fit.notes, *filter(None, [fit.warning])]
    promise = fit.memory.promise if fit is not None else None
    kept = promise.cache_bytes if promise is not None else cache_bytes(options.prefix_cache)
    more = more | {"devices": fit.devices if fit is not None else (), "cache_bytes": kept}
    if fit is not None:
        more["planned_bytes"] = fit.host_demand.total_bytes + fit.ram_budget_bytes
        more["total_bytes"] = promise.total_bytes if promise is not None else 0
    if engine is None or fit is None or not info.is_moe:
        return _construct(info, options, asked, engine, use_mmap=True, **more), notices
    from mobile_gguf.generate.passes.buddies import read_buddies
    from mobile_gguf.generate.passes.corrections import read_corrections
    from mobile_gguf.generate.passes.head import read_head

    head, buddies, corrections = read_head(info), read_buddies(info), read_corrections(info)
    engine.set_load_params(
        budget_bytes=fit.store_bytes,
        io_threads=options.io_threads,
        eviction=options.eviction,
        io=options.io,
        on_host=bool(fit.devices),
        # of a budget that is more than there is, only what is used is taken
        prefault=not fit.warning,
    )
    try:
        llama = _construct(info, options, asked, engine, use_mmap=False, **more)
    finally:
        engine.clear_load_params()
    llama.decoder.head, llama.decoder.buddies, llama.corrections = head, buddies, corrections
    if llama.store is None:
        notices.append(
            f"the engine cannot hold the experts of a {info.architecture} model: no budget, only mode exact"
        )
        return llama, notices
    try:
        # what comes early comes by the clock, and rules for missing experts would hang on it
        prefetch = OFF if options.deterministic else options.prefetch
        set_prefetch(engine, llama.ctx, prefetch)
        _set_split(llama, info, options, fit)
        if fit.devices:
            calls = DeviceCalls(engine, llama.ctx)
            hold = holder(engine, llama.ctx, prefetch)
            llama.device, remarks = start_tier(calls, info, options, fit, hold)
            notices += remarks
        if options.warm == ON and not options.deterministic:
            llama.warm = WarmSet(engine, llama.ctx, info.path, info.files)
            llama.warm.begin()
    except BaseException:
        llama.close()
        raise
    return llama, notices


def _set_split(llama: MobileLlama, info: GgufInfo, options: LoadOptions, fit: Fit) -> None:
    """Keep the segments that the file's plan for this budget says; whole experts without one."""
    if options.split == OFF or fit.store_bytes == 0 or info.segments == 1:
        return
    plan = split_plan_for(info, RAM, fit.store_bytes)
    if plan is not None and plan.split is not None and llama.engine is not None:
        set_split(llama.engine, llama.ctx, plan.split)
        llama.split = plan.split


def _construct(
    info: GgufInfo,
    options: LoadOptions,
    asked: Asked,
    engine: Engine | None,
    *,
    use_mmap: bool,
    progress: Progress | None = None,
    **more: Any,
) -> MobileLlama:
    """Make the backend; ``more`` holds ``devices``, none for the host alone, and keywords of Native's."""
    from mobile_gguf.generate.context.native import GGML_TYPES
    from mobile_gguf.generate.context.pace import follow_machine
    from mobile_gguf.generate.llama import MobileLlama

    threads, threads_batch = default_threads()
    watch = _LoadWatch(progress) if progress is not None else None
    clear_errors()
    clear_loss()
    llama: MobileLlama | None = None
    try:
        with held_interrupts() as interrupted:
            if watch is not None:
                watch.interrupted = interrupted
            types: dict[str, Any] = {
                "type_k": GGML_TYPES[asked.kv.keys],
                "type_v": GGML_TYPES[asked.kv.values],
            }
            llama = MobileLlama(
                info.path,
                engine=engine,
                n_ctx=asked.n_ctx,
                n_batch=options.n_batch or max(DEFAULT_UBATCH, asked.n_ubatch),
                n_ubatch=asked.n_ubatch,
                n_threads=options.threads or threads,
                n_threads_batch=options.threads_batch or options.threads or threads_batch,
                flash_attn=asked.flash_attn,
                use_mmap=use_mmap,
                n_sequences=asked.sequences.n,
                in_turn=asked.sequences.is_apart,
                is_deterministic=options.deterministic,
                grows=options.parallel == AUTO_PARALLEL,
                sessions=sessions_of(info, options, asked, [one.name for one in more.get("devices", ())]),
                keep_loading=watch,
                **(types | more),
            )
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if watch is not None and watch.error is not None:
            raise watch.error from None
        reason = engine.last_error() if engine is not None else ""
        # what keys and values are kept as does not go with every model and backend
        other = {} if asked.kv == F16_KV else {"remedy": "-ctk f16 -ctv f16"}
        raise _load_error(info, asked.n_ctx, error, reason, **other) from None
    except BaseException:
        if llama is not None:  # Ctrl-C was held back until it was made
            llama.close()
        raise
    if options.n_ubatch == AUTO_UBATCH and asked.n_ubatch > DEFAULT_UBATCH:
        llama.decoder.as_with_ubatch = DEFAULT_UBATCH
    if options.threads_auto == ON:
        follow_machine(llama)
    llama.speculation.state(info)
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


def _load_error(
    info: GgufInfo, n_ctx: int, error: BaseException, reason: str, remedy: str = "a smaller --ctx-size"
) -> MobileError:
    logged = last_errors()
    lost = last_loss()
    if lost:
        return EngineError(f"{info.path} cannot be loaded: {lost}")
    if reason:
        kind = BudgetError if "budget" in reason else EngineError
        return kind(f"{info.path} cannot be loaded: {reason}")
    if isinstance(error, NoContextError):
        return EngineError(f"no context of {n_ctx} tokens for {info.path}: {logged or error}; try {remedy}")
    return ModelFormatError(f"{info.path} cannot be loaded: {logged or error}")
