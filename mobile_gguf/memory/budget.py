"""Pure arithmetic of the host budget: what memory is left for experts once the rest is counted."""

from __future__ import annotations

from dataclasses import dataclass

from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import MIB, Size, format_bytes

from .demand import Demand
from .machine import Memory

_RESERVE_MIN = 64 * MIB
_RESERVE_SHARE = 20
_SECTOR = 512


@dataclass(frozen=True)
class BudgetPlan:
    """The expert budget to ask the engine for, and why it may be more than there is."""

    budget_bytes: int  # 0: every expert is kept, as the engine's load parameters have it
    warning: str = ""


def plan_budget(
    size: Size, info: GgufInfo, demand: Demand, memory: Memory, *, is_bound: bool = False
) -> BudgetPlan:
    """Turn what was asked for into the byte budget of the expert store.

    A share is one of the expert bytes; ``auto`` is what the memory available leaves after ``demand``
    and a reserve. What was asked for beyond the memory is kept with a warning, but under a cgroup's limit,
    which the kernel enforces with a kill, it becomes what the limit and a reserve leave, unless ``demand``
    is but an upper bound (``is_bound``). Raises BudgetError below one layer's experts, the smallest legal
    budget.
    """
    available = memory.available_bytes
    if size.is_auto:
        budget = available - demand.total_bytes - reserve_bytes(available)
        if budget < info.budget_min_bytes:
            raise BudgetError(
                f"not enough memory for this model: {memory.source} has {format_bytes(available)} left; "
                f"{demand}, a reserve of {format_bytes(reserve_bytes(available))} and one layer's experts "
                f"({format_bytes(info.budget_min_bytes)}) must fit; try a smaller --ctx-size or "
                "--ubatch-size, or set --ram-budget"
            )
        # Keeping all of them repacks whole tensors, each with its bytes twice in memory for a moment.
        staging = max(layer.file_bytes for layer in info.expert_layers)
        if budget < info.budget_all_bytes + staging:
            budget = min(budget, info.budget_all_bytes - 1)
    else:
        budget = asked_bytes(size, info)
        # Between this and budget_min_bytes it depends on the file system, and the engine decides.
        if budget < max(layer.file_bytes for layer in info.expert_layers):
            share = info.budget_min_bytes / info.expert_bytes
            raise BudgetError(
                f"--ram-budget {size} is too small: the smallest legal budget for this model is "
                f"{info.budget_min_bytes} bytes ({format_bytes(info.budget_min_bytes)}, "
                f"{_percent_up(share)} of its experts), one layer's experts, because a prompt needs "
                "nearly all of them at once"
            )
    warning = ""
    if not size.is_auto:
        budget, warning = _within(size, budget, info, demand, memory, may_cut=not is_bound)
    return BudgetPlan(0 if budget >= info.budget_all_bytes else budget, warning)


def asked_bytes(size: Size, info: GgufInfo) -> int:
    """The budget that bytes or a share of the experts stand for."""
    if size.n_bytes is not None:
        return size.n_bytes
    fraction = size.fraction or 0
    # All of them is a little more than their bytes, for alignment.
    return info.budget_all_bytes if fraction >= 1 else int(info.expert_bytes * fraction)


def stored_share(info: GgufInfo, budget_bytes: int) -> float:
    """The part of all experts that the store holds in a budget: 1 where all stay.

    Pieces start anywhere in a sector, and disks' sectors are smaller than what the budget allows for.
    """
    if budget_bytes <= 0 or budget_bytes >= info.budget_all_bytes:
        return 1.0
    return min(0.999, budget_bytes / sum(layer.store_bytes(_SECTOR) for layer in info.expert_layers))


def _percent_up(share: float) -> str:
    """A share rounded up to a tenth of a percent, so that asking for what is printed works."""
    return f"{-int(-share * 1000 // 1) / 10:g}%"


def reserve_bytes(available: int) -> int:
    """What an ``auto`` budget leaves of the memory available."""
    return max(_RESERVE_MIN, available // _RESERVE_SHARE)


def _within(
    size: Size, asked: int, info: GgufInfo, demand: Demand, memory: Memory, *, may_cut: bool
) -> tuple[int, str]:
    """The budget that was asked for, or what a hard limit leaves of it, and a warning if it may not fit."""
    budget = min(asked, info.budget_all_bytes)
    cuts = may_cut and memory.is_capped
    # under a limit also for what the process itself still grows by
    left = memory.available_bytes - demand.total_bytes - (_RESERVE_MIN if cuts else 0)
    if budget <= left:
        return asked, ""
    warning = (
        f"--ram-budget {size} may not fit: {format_bytes(budget)} of experts and about "
        f"{format_bytes(demand.total_bytes)} for the rest, but {memory.source} has "
        f"{format_bytes(memory.available_bytes)} available"
    )
    smaller = max(left, info.budget_min_bytes)
    if not cuts or smaller >= budget:
        return asked, warning
    return smaller, f"{warning}: the budget is {format_bytes(smaller)}"
