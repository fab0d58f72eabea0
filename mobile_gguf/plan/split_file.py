"""Splits in a model's file (``mobile.plan.json``): which segments to keep under which budget.

Made by ``mobile-gguf calibrate --plan``, taken by a load with a budget near theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mobile_gguf.engine.split import Split
from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo

# a budget that differs by less is as good as the one planned for
_NEAR = 0.1


@dataclass(frozen=True)
class SplitPlan:
    """A split for a tier's budget, and what a token was foreseen to take: milliseconds and bytes moved.

    ``kept`` and ``shares`` by the model's layers, as ``Split`` has them; ``whole_...`` are those of whole
    experts. ``text`` is what was run, ``n_tokens`` of it.
    """

    tier: str
    budget_bytes: int
    n_segments: int
    kept: tuple[int, ...]
    shares: tuple[float, ...]
    ms: float
    bytes: float
    whole_ms: float
    whole_bytes: float
    text: str
    n_tokens: int

    @property
    def is_whole(self) -> bool:
        """Whether it keeps experts whole and wishes nothing."""
        return not any(self.shares) and all(kept == self.n_segments for kept in self.kept)

    @property
    def split(self) -> Split | None:
        """As the engine takes it; None: whole experts."""
        return None if self.is_whole else Split(self.kept, self.shares)


def read_split_plans(info: GgufInfo) -> list[SplitPlan]:
    """The plans in a file, those for other numbers of segments left out. Raises ModelFormatError."""
    text = info.metadata.get(keys.PLAN)
    if text is None:
        return []
    try:
        entries = json.loads(text)["plans"]
        plans = [_plan(info, entry) for entry in entries]
    except (TypeError, ValueError, KeyError, RecursionError):
        raise ModelFormatError(
            f"{info.path}: metadata {keys.PLAN} is damaged; run `mobile-gguf calibrate --plan` again"
        ) from None
    return [plan for plan in plans if plan.n_segments == info.segments]


def _plan(info: GgufInfo, entry: dict[str, Any]) -> SplitPlan:
    fields: dict[str, Any] = {**entry, "kept": tuple(entry["kept"]), "shares": tuple(entry["shares"])}
    plan = SplitPlan(**fields)
    numbers = (plan.ms, plan.bytes, plan.whole_ms, plan.whole_bytes, *plan.shares)
    counts = (plan.budget_bytes, plan.n_segments, plan.n_tokens, *plan.kept)
    good = (
        all(type(count) is int and count > 0 for count in counts)
        and all(type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers)
        and len(plan.kept) == len(plan.shares) == info.n_layer
        and all(kept <= plan.n_segments for kept in plan.kept)
        and all(share <= 1 for share in plan.shares)
        and isinstance(plan.tier, str)
        and isinstance(plan.text, str)
    )
    if not good:
        raise ValueError
    return plan


def split_plan_for(info: GgufInfo, tier: str, budget_bytes: int) -> SplitPlan | None:
    """The plan for the budget nearest to one, None if none is near. Raises ModelFormatError."""
    plans = [plan for plan in read_split_plans(info) if plan.tier == tier]
    plan = min(plans, key=lambda one: abs(one.budget_bytes - budget_bytes), default=None)
    if plan is None or abs(plan.budget_bytes - budget_bytes) > _NEAR * plan.budget_bytes:
        return None
    return plan


def split_plans_text(known: Sequence[SplitPlan], made: Sequence[SplitPlan]) -> str:
    """Metadata that holds ``made``, and of ``known`` those for other budgets."""
    ours = {(plan.tier, plan.budget_bytes) for plan in made}
    kept = [plan for plan in known if (plan.tier, plan.budget_bytes) not in ours]
    return json.dumps({"plans": [asdict(plan) for plan in (*kept, *made)]})
