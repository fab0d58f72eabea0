"""How long a context is where nobody says: what fits of the model's own, beside the experts. Pure.

A context takes memory for all of its tokens at once, and experts that lack that memory are read again and
again, for every token; so it grows where the experts hardly feel it, and where memory is left anyway. Lengths
are doubled, so that the same machine has the same context on most days.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo

from .budget import reserve_bytes
from .demand import DEFAULT_CONTEXT
from .microbatch import growth_pays

if TYPE_CHECKING:
    from .fit import Asked, Fit

_SHORTEST = 512

Fitting = Callable[["Asked"], "Fit"]


def other_contexts(info: GgufInfo, usual: int) -> tuple[int, ...]:
    """Lengths that may be taken instead of the usual one: longer ones ascending, then shorter ones
    descending."""
    trained = info.n_ctx_train or DEFAULT_CONTEXT
    longer, size = [], 2 * usual
    while size < trained:
        longer.append(size)
        size *= 2
    shorter, size = [], usual // 2
    while size >= _SHORTEST:
        shorter.append(size)
        size //= 2
    return (*longer, *((trained,) if trained > usual else ()), *shorter)


def with_context(asked: Asked, fit: Fitting) -> Asked:
    """``asked`` with the context that is chosen. Raises BudgetError if not even the shortest one fits."""
    usual = replace(asked, other_contexts=())
    try:
        base = fit(usual)
    except BudgetError:
        return _shorter(asked, fit)
    if not _is_fine(base):
        return _shorter(asked, fit, usual)
    chosen = usual
    for n_ctx in (n for n in asked.other_contexts if n > asked.n_ctx):
        longer = replace(usual, n_ctx=n_ctx)
        try:
            more = fit(longer)
        except BudgetError:
            break
        if not _is_beside(base, more):
            break
        chosen = longer
    return chosen


def _shorter(asked: Asked, fit: Fitting, otherwise: Asked | None = None) -> Asked:
    """The longest one below the usual that fits without a warning; the usual one's error or warning if none
    does."""
    for n_ctx in (n for n in asked.other_contexts if n < asked.n_ctx):
        shorter = replace(asked, n_ctx=n_ctx, other_contexts=())
        try:
            if _is_fine(fit(shorter)):
                return shorter
        except BudgetError:
            continue
    if otherwise is None:
        fit(replace(asked, other_contexts=()))  # raises
    return otherwise or replace(asked, other_contexts=())


def _is_fine(fit: Fit) -> bool:
    """Whether it may be loaded without a word; of a model without experts nothing says a word."""
    is_dense_here = not fit.ram_budget_bytes and not fit.devices
    return not (fit.warning or (is_dense_here and fit.demand.total_bytes > fit.memory.available_bytes))


def _is_beside(base: Fit, more: Fit) -> bool:
    """Whether a longer context leaves experts nearly what they had, and takes at most half of the rest."""
    if not _is_fine(more) or more.devices != base.devices:
        return False
    budgets = [
        (base.ram_budget_bytes, more.ram_budget_bytes),
        (base.vram_budget_bytes, more.vram_budget_bytes),
    ]
    if not all(growth_pays(before, after) for before, after in budgets):
        return False
    available = base.memory.available_bytes
    left = available - reserve_bytes(available) - base.host_demand.total_bytes - base.ram_budget_bytes
    if not _takes_half(base.host_demand.total_bytes, more.host_demand.total_bytes, left, *budgets[0]):
        return False
    if not base.devices:
        return True
    left = (
        sum(device.free_bytes for device in base.devices) - base.demand.total_bytes - base.vram_budget_bytes
    )
    return _takes_half(base.demand.total_bytes, more.demand.total_bytes, left, *budgets[1])


def _takes_half(before: int, after: int, left: int, budget: int, new_budget: int) -> bool:
    return after - before <= max(0, left) // 2 + max(0, budget - new_budget)
