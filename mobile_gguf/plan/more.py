"""What one more GiB of memory would buy: experts and so tokens per second, or a longer context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mobile_gguf.gguf.caches import CONTEXT_MULTIPLE
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import stored_share
from mobile_gguf.memory.fit import Fit, host_demand
from mobile_gguf.sizes import GIB

Speed = Callable[[Fit], float | None]


@dataclass(frozen=True)
class OneMore:
    """Now, and then: tokens per second (None: not measured), the experts' share; or tokens of context."""

    tps: tuple[float, float] | None
    ram_share: tuple[float, float]
    n_ctx: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens_per_second": self.tps and [round(one, 3) for one in self.tps],
            "ram_share": [round(one, 4) for one in self.ram_share],
            "n_ctx": list(self.n_ctx),
        }

    def __str__(self) -> str:
        (share, more_share), (n_ctx, more_ctx) = self.ram_share, self.n_ctx
        ways = []
        if more_share > share and self.tps is not None:
            ways.append(f"{self.tps[1]:.3g} tokens/s instead of {self.tps[0]:.3g}")
        elif more_share > share:
            ways.append(f"{more_share:.0%} of the experts in RAM instead of {share:.0%}")
        if more_ctx > n_ctx:
            ways.append(f"a context of {more_ctx} tokens instead of {n_ctx}")
        return ", or ".join(ways) or "nothing: the experts are in RAM, and the context is the model's own"


def one_more_gib(info: GgufInfo, fit: Fit, speed: Speed) -> OneMore:
    """What a fit on the host would gain; ``speed`` predicts one of a fit."""
    budget = min(fit.ram_budget_bytes + GIB, info.budget_all_bytes) if info.is_moe else 0
    share = stored_share(info, budget) if info.is_moe else 1.0
    speeds = [speed(one) for one in (fit, replace(fit, ram_budget_bytes=budget, ram_share=share))]
    tps = (speeds[0], speeds[1]) if speeds[0] is not None and speeds[1] is not None else None
    return OneMore(tps, (fit.ram_share, share), (fit.asked.n_ctx, longest_context(info, fit, GIB)))


def longest_context(info: GgufInfo, fit: Fit, n_bytes: int) -> int:
    """Tokens of the longest context, up to the model's own, that takes ``n_bytes`` more than the present
    one."""
    asked = fit.asked
    room = host_demand(info, asked).total_bytes + n_bytes
    low, high = 0, max(0, -(-(info.n_ctx_train - asked.n_ctx) // CONTEXT_MULTIPLE))
    while low < high:
        middle = (low + high + 1) // 2
        longer = replace(asked, n_ctx=asked.n_ctx + middle * CONTEXT_MULTIPLE)
        if host_demand(info, longer).total_bytes <= room:
            low = middle
        else:
            high = middle - 1
    return max(asked.n_ctx, min(info.n_ctx_train, asked.n_ctx + low * CONTEXT_MULTIPLE))
