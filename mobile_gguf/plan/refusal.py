"""A plan is stricter than a load: what memory lacks for is refused, with what would fit instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mobile_gguf.engine.buffers import Context
from mobile_gguf.engine.devices import Device
from mobile_gguf.errors import BudgetError, MobileError
from mobile_gguf.gguf.caches import CONTEXT_MULTIPLE
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import asked_bytes, reserve_bytes
from mobile_gguf.memory.demand import context_of
from mobile_gguf.memory.fit import Asked, Fit, fit_model, host_demand
from mobile_gguf.memory.machine import Memory
from mobile_gguf.sizes import AUTO, format_bytes, mebibytes

_SMALL_UBATCH = 128
_PLENTY = Memory(1 << 62, 1 << 62, "")


class FitError(MobileError):
    """A model, or the budgets asked for, do not fit on this machine."""


def plan_fit(
    info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device] = (), n_bits: float = 0.0
) -> Fit:
    """Where a load would put the model (``fit_model``). ``n_bits``: the file's per weight, to speak of them.

    Raises FitError, saying what would fit instead, also for what a load only warns of.
    """
    try:
        fit = fit_model(info, asked, memory, devices)
    except BudgetError as error:
        asked = replace(asked, other_contexts=())
        raise FitError(_refusal(info, asked, memory, devices, str(error), n_bits)) from None
    free = memory.available_bytes
    asked = replace(asked, n_ctx=fit.asked.n_ctx, other_contexts=())
    if fit.warning:
        wanted = min(asked_bytes(asked.ram, info), info.budget_all_bytes)
        raise FitError(
            f"--ram-budget {asked.ram} does not fit: {format_bytes(wanted)} of experts and "
            f"{format_bytes(fit.host_demand.total_bytes)} for the rest, but {memory.source} has "
            f"{format_bytes(free)} available; {_largest_budget(info, asked, memory, devices)}"
        )
    if not info.is_moe and not fit.devices and fit.demand.total_bytes > free:
        raise FitError(_host_refusal(info, asked, memory, n_bits))
    return fit


def _refusal(
    info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device], why: str, n_bits: float
) -> str:
    on_device = asked.insists and asked.vram is not None and bool(devices)
    if on_device and not _fits(info, replace(asked, ram=AUTO), _PLENTY, devices):
        return f"{why}{_device_ways(info, replace(asked, ram=AUTO), devices)}"
    if on_device or not asked.ram.is_auto:
        return why
    return _host_refusal(info, asked, memory, n_bits)


def _device_ways(info: GgufInfo, asked: Asked, devices: Sequence[Device]) -> str:
    """What would fit on devices, however much memory the host has."""
    auto = fit_model(info, replace(asked, vram=AUTO, servers=False), _PLENTY, devices)
    if auto.vram_budget_bytes:
        return f"; --vram-budget {mebibytes(auto.vram_budget_bytes)} does"
    context = _smaller_context(info, asked, _PLENTY, devices)
    return f"; {context} does" if context else ""


def _host_refusal(info: GgufInfo, asked: Asked, memory: Memory, n_bits: float) -> str:
    """Why a model does not fit on the host, and what would."""
    free, smallest = memory.available_bytes, info.budget_min_bytes
    reserve = reserve_bytes(free)
    demand = host_demand(info, asked)
    least = f", one layer's experts {format_bytes(smallest)}" if info.is_moe else ""
    ways = [_smaller_context(info, asked, memory, ())]
    if not asked.flash_attn:
        ways.append(_with_flash_attention(info, asked, memory))
    fixed = demand.kv_bytes + demand.buffer_bytes + reserve
    if n_bits and free > fixed:
        bits = n_bits * (free - fixed) / (demand.dense_bytes + smallest)
        if bits >= 1:
            ways.append(f"a quantisation of at most {bits:.1f} bits a weight instead of {n_bits:.1f}")
    ways.append(f"{format_bytes(demand.total_bytes + smallest + reserve)} of free memory")
    return (
        f"{info.path.name} does not fit: {memory.source} has {format_bytes(free)} available; "
        f"{demand}{least}, a reserve of {format_bytes(reserve)}; what would fit: "
        + "; or ".join(way for way in ways if way)
    )


def _largest_budget(info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device]) -> str:
    try:
        fit = fit_model(info, replace(asked, ram=AUTO), memory, devices)
    except BudgetError:
        return "no budget does: use a smaller --ctx-size or --ubatch-size"
    return f"--ram-budget {mebibytes(fit.ram_budget_bytes)} does"


def compared(asked: Asked) -> list[Context]:
    """The contexts that are looked at beside what is asked for: as long, but smaller."""
    return [
        context_of(asked.n_ctx, n_ubatch, flash_attn)
        for flash_attn in dict.fromkeys((asked.flash_attn, True))
        for n_ubatch in _ubatches(asked)
    ]


def _ubatches(asked: Asked) -> list[int]:
    return list(dict.fromkeys((asked.n_ubatch, min(asked.n_ubatch, _SMALL_UBATCH))))


def _with_flash_attention(info: GgufInfo, asked: Asked, memory: Memory) -> str:
    """The flags with which more of the context, or a larger micro-batch, fits; empty if none does."""
    without = largest_context(info, asked, memory)
    found = largest_context(info, replace(asked, flash_attn=True), memory)
    if found is None or (without is not None and found <= without):
        return ""
    return f"{_flags(asked, *found)} --flash-attn"


def _smaller_context(info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device]) -> str:
    """The flags with which the model fits; empty if no context does."""
    found = largest_context(info, asked, memory, devices)
    if found is None:
        return ""
    return _flags(asked, *found)


def _flags(asked: Asked, n_ctx: int, n_ubatch: int) -> str:
    ubatch = f" -ub {n_ubatch}" if n_ubatch != asked.n_ubatch else ""
    return f"-c {n_ctx}{ubatch}"


def largest_context(
    info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device] = ()
) -> tuple[int, int] | None:
    """The largest context up to what was asked, and the micro-batch with it, that fit; None if none does.

    A smaller micro-batch costs prompts time, a smaller context what can be said at all.
    """
    ubatches = _ubatches(asked)
    for n_ubatch in ubatches:
        if _fits(info, replace(asked, n_ubatch=n_ubatch), memory, devices):
            return asked.n_ctx, n_ubatch
    for n_ubatch in ubatches:
        low, high = 0, -(-asked.n_ctx // CONTEXT_MULTIPLE)
        while low < high:
            middle = (low + high + 1) // 2
            smaller = replace(asked, n_ctx=middle * CONTEXT_MULTIPLE, n_ubatch=n_ubatch)
            if _fits(info, smaller, memory, devices):
                low = middle
            else:
                high = middle - 1
        if low > 0:
            return min(low * CONTEXT_MULTIPLE, asked.n_ctx), n_ubatch
    return None


def _fits(info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device]) -> bool:
    try:
        fit = fit_model(info, asked, memory, devices)
    except BudgetError:
        return False
    dense_on_host = not info.is_moe and not fit.devices
    return not (dense_on_host and fit.demand.total_bytes > memory.available_bytes)
