"""Pure arithmetic of the host budget: what memory is left for experts once the rest is counted.

Estimates err on the high side: an ``auto`` budget must not get the process killed, and an
expert that was not kept costs a read, not a crash.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import MIB, Size, format_bytes

from .machine import Memory

CONTEXT_MULTIPLE = 256
DEFAULT_CONTEXT = 4096
_F16, _F32 = 2, 4
# The engine's vocabulary: token texts, two hash maps and the merges, measured at 300-400 bytes a token.
_VOCABULARY_BYTES = 400
_RESERVE_MIN = 64 * MIB
_RESERVE_SHARE = 20


@dataclass(frozen=True)
class Demand:
    """Memory a model takes beside its experts, in bytes."""

    dense_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class BudgetPlan:
    """The expert budget to ask the engine for, and what it was derived from, in bytes."""

    budget_bytes: int  # 0: every expert is kept, as the engine's load parameters have it
    expert_bytes: int
    demand: Demand
    available_bytes: int
    warning: str = ""


def context_size(info: GgufInfo, asked: int | None) -> int:
    """Tokens of context: as asked, 0 for the model's own, by default that but at most 4096."""
    trained = info.n_ctx_train or DEFAULT_CONTEXT
    if asked is None:
        return min(DEFAULT_CONTEXT, trained)
    return asked or trained


def estimate_demand(info: GgufInfo, *, n_ctx: int, n_ubatch: int, flash_attn: bool = False) -> Demand:
    """Dense weights, KV cache (f16) and compute buffers for a context of ``n_ctx`` tokens."""
    n_ctx = -(-n_ctx // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
    return Demand(
        dense_bytes=info.dense_bytes,
        kv_bytes=kv_cache_bytes(info, n_ctx),
        compute_bytes=compute_buffer_bytes(info, n_ctx, min(n_ubatch, n_ctx), flash_attn),
    )


def kv_cache_bytes(info: GgufInfo, n_ctx: int) -> int:
    """Keys and values of every layer, f16; no discount for sliding windows."""
    return n_ctx * sum(info.n_head_kv) * (info.key_length + info.value_length) * _F16


def compute_buffer_bytes(info: GgufInfo, n_ctx: int, n_ubatch: int, flash_attn: bool) -> int:
    """Activations of one micro-batch of ``n_ubatch`` tokens, one token's logits and the vocabulary.

    Without flash attention the scores [heads, n_ctx, n_ubatch] dominate. The engine reserves room for
    logits of every token of the batch, but what is never written is never resident.
    """
    heads = max(info.n_head, default=0)
    scores = 0 if flash_attn else heads * n_ctx * n_ubatch * _F32
    routed = max(1, info.n_expert_used)
    outputs = (info.segments + 1) * info.n_embd  # of each expert: of its segments, and their sum
    activations = n_ubatch * (8 * info.n_embd + routed * (3 * info.n_ff_expert + outputs)) * _F32
    mask = n_ctx * n_ubatch * _F32
    logits = 2 * info.n_vocab * _F32
    return scores + activations + mask + logits + info.n_vocab * _VOCABULARY_BYTES


def plan_budget(size: Size, info: GgufInfo, demand: Demand, memory: Memory) -> BudgetPlan:
    """Turn what was asked for into the byte budget of the expert store.

    A share is one of the expert bytes; ``auto`` is what the memory available leaves after ``demand``
    and a reserve. Raises BudgetError below one layer's experts, the smallest legal budget.
    """
    available = memory.available_bytes
    if size.is_auto:
        budget = available - demand.total_bytes - _reserve(available)
        if budget < info.budget_min_bytes:
            raise BudgetError(
                f"not enough memory for this model: {memory.source} has {format_bytes(available)} left; "
                f"dense weights {format_bytes(demand.dense_bytes)}, KV {format_bytes(demand.kv_bytes)}, "
                f"buffers {format_bytes(demand.compute_bytes)}, a reserve of "
                f"{format_bytes(_reserve(available))} and one layer's experts "
                f"({format_bytes(info.budget_min_bytes)}) must fit; try a smaller --ctx-size or "
                "--ubatch-size, or set --ram-budget"
            )
        # Keeping all of them repacks whole tensors, each with its bytes twice in memory for a moment.
        staging = max(layer.file_bytes for layer in info.expert_layers)
        if budget < info.budget_all_bytes + staging:
            budget = min(budget, info.budget_all_bytes - 1)
    else:
        budget = _asked_bytes(size, info)
        # Between this and budget_min_bytes it depends on the file system, and the engine decides.
        if budget < max(layer.file_bytes for layer in info.expert_layers):
            share = info.budget_min_bytes / info.expert_bytes
            raise BudgetError(
                f"--ram-budget {size} is too small: the smallest legal budget for this model is "
                f"{info.budget_min_bytes} bytes ({format_bytes(info.budget_min_bytes)}, "
                f"{_percent_up(share)} of its experts), one layer's experts, because a prompt needs "
                "nearly all of them at once"
            )
    keeps_all = budget >= info.budget_all_bytes
    return BudgetPlan(
        budget_bytes=0 if keeps_all else budget,
        expert_bytes=info.expert_bytes,
        demand=demand,
        available_bytes=available,
        warning="" if size.is_auto else _warning(size, min(budget, info.budget_all_bytes), demand, memory),
    )


def _asked_bytes(size: Size, info: GgufInfo) -> int:
    if size.n_bytes is not None:
        return size.n_bytes
    fraction = size.fraction or 0
    # All of them is a little more than their bytes, for alignment.
    return info.budget_all_bytes if fraction >= 1 else int(info.expert_bytes * fraction)


def _percent_up(share: float) -> str:
    """A share rounded up to a tenth of a percent, so that asking for what is printed works."""
    return f"{-int(-share * 1000 // 1) / 10:g}%"


def _reserve(available: int) -> int:
    return max(_RESERVE_MIN, available // _RESERVE_SHARE)


def _warning(size: Size, budget: int, demand: Demand, memory: Memory) -> str:
    needed = budget + demand.total_bytes
    if needed <= memory.available_bytes:
        return ""
    return (
        f"--ram-budget {size} may not fit: {format_bytes(budget)} of experts and about "
        f"{format_bytes(demand.total_bytes)} for the rest, but {memory.source} has "
        f"{format_bytes(memory.available_bytes)} available"
    )
