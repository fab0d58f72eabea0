"""``calibrate --plan``: which leading segments to keep under a budget, on this machine and for a text.

The text's routing is observed, the machine measured as ``mobile-gguf plan`` does, and MoEpic's configurator
(``mobile_gguf/plan/split.py``) chooses; whole experts and what was chosen are then run in turn, which sets
the times right and may undo the choice. What was calibrated before stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.api.loading import open_backend
from mobile_gguf.engine.binding import find_engine, needs_engine
from mobile_gguf.errors import UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.memory.budget import asked_bytes
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import RAM
from mobile_gguf.plan.split import Choice, Costs, Outcome, as_measured
from mobile_gguf.plan.split_costs import choose_split, measured_costs
from mobile_gguf.plan.split_file import SplitPlan, read_split_plans, split_plans_text
from mobile_gguf.plan.workload import make_settings
from mobile_gguf.progress import Progress, no_progress
from mobile_gguf.sizes import AUTO, OFF, Size, format_bytes
from mobile_gguf.wording import columns

from ..engine_task import in_child
from ..gguf.file import update_gguf
from .collect import run_routed
from .plan_timed import time_splits
from .statistics import Floats, Ids
from .text import Text, cut_blocks, read_text

# more would take longer to replay than it would teach
DEFAULT_TOKENS = 1536


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """``budgets`` of host memory to plan for; the rest as ``CalibrateOptions`` has it."""

    budgets: tuple[Size, ...]
    text: tuple[Path, ...] = ()
    tokens: int = DEFAULT_TOKENS
    out: Path | None = None
    threads: int | None = None
    ram_budget: Size = AUTO


@dataclass(frozen=True)
class Planned:
    """A budget, what was weighed for it, and what the file says now."""

    budget: Size
    choice: Choice
    plan: SplitPlan

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what the file says, and what was weighed beside it."""
        choice = self.choice
        return {
            "plan": asdict(self.plan) | {"is_whole": self.plan.is_whole},
            "whole": asdict(choice.whole),
            "alike": [asdict(one) for one in choice.alike],
            "by_layer": asdict(choice.by_layer),
        }


class _RouteLog:
    """Keeps the routing of a text, [n_tokens, n_layer_moe, k]."""

    def __init__(self, info: GgufInfo) -> None:
        self.layers = tuple(layer for layer in info.moe_layers if layer < info.n_layer)
        self.n_expert_used = info.n_expert_used
        self._parts: list[Ids] = []

    def add(self, ids: Ids, weights: Floats) -> None:
        del weights
        self._parts.append(ids.transpose(1, 0, 2))

    def routes(self) -> npt.NDArray[np.int32]:
        return np.concatenate(self._parts)


def plan_splits(path: Path, options: PlanOptions, progress: Progress = no_progress) -> list[Planned]:
    """Choose a split for every budget and write them into the model's file, or into a copy.

    Raises UsageError (whole experts, a budget that holds all of them or too few, too little text),
    EngineError, MobileError where the machine could not be measured.
    """
    info = read_gguf_info(path)
    known = read_split_plans(info)
    budgets = [_bytes_of(size, info) for size in options.budgets]
    check_split_model(info, options.out)
    text = read_text(options.text)
    routes, blocks, costs, eviction = in_child(_observe, info, text, options, progress=progress)
    threads = make_settings(info, LoadOptions(threads=options.threads, vram_budget=OFF), 0.5).threads
    planned = []
    for size, n_bytes in zip(options.budgets, budgets, strict=True):
        progress(f"weighing splits for {size}", len(planned) / len(budgets))
        choice = choose_split(info, routes, n_bytes, costs, eviction)
        chosen = _plan_of(info, n_bytes, choice, text, len(routes)).split
        splits = [None] if chosen is None else [None, chosen]
        seconds = in_child(time_splits, info, blocks, splits, n_bytes, threads, progress=progress)
        choice = as_measured(choice, *seconds)
        planned.append(Planned(size, choice, _plan_of(info, n_bytes, choice, text, len(routes))))
    update_gguf(
        path,
        set={keys.PLAN: split_plans_text(known, [one.plan for one in planned])},
        out=options.out,
        progress=progress,
    )
    return planned


def check_split_model(info: GgufInfo, out: Path | None) -> None:
    """Refuse at once what would only fail later. Raises UsageError, EngineError."""
    name = info.path.name
    if not info.is_moe:
        raise UsageError(f"{name} has no experts: there is nothing to split")
    if info.segments == 1:
        raise UsageError(
            f"{name} holds its experts whole: make a file of segments first, "
            f"`mobile-gguf convert {info.path} --segments 8`"
        )
    if len(info.files) > 1 and out is None:
        raise UsageError(
            f"{name} is split into {len(info.files)} files: give --out FILE for one that holds all"
        )
    if find_engine() is None:
        raise needs_engine("planning a split")


def _bytes_of(size: Size, info: GgufInfo) -> int:
    if size.is_auto:
        raise UsageError("--plan RAM=auto: a plan is for a size, such as RAM=25% or RAM=4GiB")
    n_bytes = asked_bytes(size, info)
    if n_bytes >= info.budget_all_bytes:
        raise UsageError(f"--plan RAM={size}: that holds every expert, and nothing is ever read")
    if n_bytes < info.budget_min_bytes:
        raise UsageError(
            f"--plan RAM={size} is below the smallest budget of this model, {info.budget_min_bytes} bytes "
            f"({format_bytes(info.budget_min_bytes)})"
        )
    return n_bytes


def _observe(
    info: GgufInfo, text: Text, options: PlanOptions, progress: Progress
) -> tuple[npt.NDArray[np.int32], list[list[int]], Costs, str]:
    """The text's routing and its tokens, and what the machine takes; in the engine's process."""
    costs, eviction = measured_costs(info, options.threads, progress)
    log, blocks = _RouteLog(info), _blocks(info, text, options)
    run_routed(
        info, blocks, log,
        ram_budget=options.ram_budget, threads=options.threads, progress=progress,
    )  # fmt: skip
    return log.routes(), blocks, costs, eviction


def _blocks(info: GgufInfo, text: Text, options: PlanOptions) -> list[list[int]]:
    llama, _ = open_backend(info, LoadOptions(n_ctx=64, vram_budget=OFF, ram_budget=options.ram_budget))
    try:
        start = llama.tokenize(b"", add_bos=True)
        return cut_blocks(
            text,
            lambda part: llama.tokenize(part.encode(), add_bos=False, special=False),
            start,
            options.tokens,
        )
    finally:
        llama.close()


def _plan_of(info: GgufInfo, n_bytes: int, choice: Choice, text: Text, n_tokens: int) -> SplitPlan:
    layers = [layer for layer in info.moe_layers if layer < info.n_layer]
    kept, shares = [info.segments] * info.n_layer, [0.0] * info.n_layer
    for layer, n, share in zip(layers, choice.chosen.kept, choice.chosen.shares, strict=True):
        kept[layer], shares[layer] = n, round(share, 6)
    return SplitPlan(
        tier=RAM, budget_bytes=n_bytes, n_segments=info.segments, kept=tuple(kept), shares=tuple(shares),
        ms=1e3 * choice.chosen.seconds, bytes=choice.chosen.n_bytes,
        whole_ms=1e3 * choice.whole.seconds, whole_bytes=choice.whole.n_bytes,
        text=text.name, n_tokens=n_tokens,
    )  # fmt: skip


def plan_lines(info: GgufInfo, planned: Sequence[Planned]) -> list[str]:
    """What was weighed, for people: a table for each budget, the chosen row with a star."""
    lines: list[str] = []
    for one in planned:
        choice, n = one.choice, info.segments
        named: list[tuple[str, Outcome]] = [("whole experts", choice.whole)]
        named += [(f"{outcome.kept[0]} of {n} segments", outcome) for outcome in choice.alike]
        named.append((f"by layer, {_span(choice.by_layer.kept)} of {n}", choice.by_layer))
        rows = [(f"RAM {one.budget}", "ms/token", "read/token")]
        rows += [
            (
                name + (" *" if outcome is choice.chosen else ""),
                f"{1e3 * outcome.seconds:.1f}",
                format_bytes(outcome.n_bytes),
            )
            for name, outcome in named
        ]
        lines += ["", *columns(rows)]
    return lines[1:]


def _span(kept: Sequence[int]) -> str:
    low, high = min(kept), max(kept)
    return str(low) if low == high else f"{low} to {high}"
