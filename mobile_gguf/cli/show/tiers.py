"""What fits where: how many of a model's experts a budget keeps in memory, on this machine and in general."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import asked_bytes
from mobile_gguf.memory.fit import asked_of, fit_model
from mobile_gguf.memory.machine import Memory, read_memory
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import AUTO, OFF, Size, format_bytes

_SHARES = tuple(Size(fraction=share) for share in (0.25, 0.5, 0.75, 1.0))


@dataclass(frozen=True)
class Tier:
    """What a ``--ram-budget`` keeps in memory: so many experts of all, or as many as so many layers have."""

    budget: str
    budget_bytes: int
    n_experts: int
    n_layers: float


@dataclass(frozen=True)
class Tiers:
    """``auto`` on this machine, None with ``problem`` if the model does not fit; and budgets by share."""

    memory: Memory
    context: int
    rest_bytes: int  # dense weights, KV cache and buffers
    auto: Tier | None
    problem: str
    shares: tuple[Tier, ...]


def make_tiers(info: GgufInfo) -> Tiers:
    """Plan the host tier for a model with experts, with the default context, in the memory available now."""
    memory = read_memory()
    problem, auto = "", None
    # a share never fails for want of memory, so the demand is known even if auto does not fit
    told = fit_model(
        info, asked_of(info, LoadOptions(ram_budget=Size(fraction=1.0), vram_budget=OFF)), memory
    )
    try:
        told = fit_model(info, asked_of(info, LoadOptions(vram_budget=OFF)), memory)
        auto = _tier(info, AUTO, told.ram_budget_bytes)
    except BudgetError as error:
        problem = str(error)
    shares = tuple(
        _tier(info, share, budget)
        for share in _SHARES
        if (budget := asked_bytes(share, info)) >= info.budget_min_bytes
    )
    return Tiers(memory, told.asked.n_ctx, told.demand.total_bytes, auto, problem, shares)


def _tier(info: GgufInfo, budget: Size, n_bytes: int) -> Tier:
    held = min(1.0, n_bytes / info.budget_all_bytes)
    n_experts = int(held * sum(layer.n_expert for layer in info.expert_layers))
    return Tier(str(budget), n_bytes, n_experts, held * info.n_layer_moe)


def tier_facts(tiers: Tiers) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "memory_available_bytes": tiers.memory.available_bytes,
        "memory_source": tiers.memory.source,
        "context": tiers.context,
        "rest_bytes": tiers.rest_bytes,
        "auto": None if tiers.auto is None else vars(tiers.auto),
        "problem": tiers.problem,
        "shares": [vars(tier) for tier in tiers.shares],
    }


def tier_rows(info: GgufInfo, tiers: Tiers) -> list[tuple[str, str]]:
    """The same for people."""
    rest = f"{format_bytes(tiers.rest_bytes)} beside the experts, with a context of {tiers.context}"
    rows = [("memory", f"{format_bytes(tiers.memory.available_bytes)} available; {rest}")]
    if tiers.auto is None:
        smallest = format_bytes(info.budget_min_bytes)
        rows.append(("--ram-budget auto", f"does not fit: one layer's experts ({smallest}) have no room"))
    for tier in (tiers.auto, *tiers.shares):
        if tier is not None:
            rows.append((f"--ram-budget {tier.budget}", _held(info, tier)))
    return rows


def _held(info: GgufInfo, tier: Tier) -> str:
    n_all = sum(layer.n_expert for layer in info.expert_layers)
    if tier.n_experts == n_all:
        return f"{format_bytes(tier.budget_bytes)}: all {n_all} experts"
    layers = f"as many as {tier.n_layers:.1f} of {info.n_layer_moe} layers have"
    share = f"{100 * tier.n_experts / n_all:.0f}%"
    return f"{format_bytes(tier.budget_bytes)}: {tier.n_experts} of {n_all} experts ({share}), {layers}"
