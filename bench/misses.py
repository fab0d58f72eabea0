"""Misses of the eviction policies on a trace, beside the bound: what a better policy could win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .simulate import POLICIES, accesses, simulate, simulate_min
from .trace import Trace


def count_misses(trace: Trace, shares: Sequence[float]) -> list[dict[str, Any]]:
    """For each share of all experts, with K and K/2 experts a token: misses per token and layer in decoding.

    The prompt warms the cache and is not counted; K/2 is used in the prompt too.
    """
    rows = []
    for share in shares:
        # all of one layer's needs must fit
        capacity = max(trace.k, int(share * trace.n_layer * trace.n_expert))
        for k in (trace.k, max(1, trace.k // 2)):
            asked = accesses(trace, k)
            n_counted = asked.n_counted
            misses = {
                name: simulate(asked, capacity, make(trace.n_layer, trace.n_expert)) / n_counted
                for name, make in POLICIES.items()
            }
            misses["MIN"] = simulate_min(asked, capacity) / n_counted
            rows.append({"share": share, "k": k, "misses": misses})
    return rows


def format_misses(trace: Trace, rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a line per budget and k."""
    names = list(rows[0]["misses"])
    lines = [
        f"misses per token and layer; {trace.source}: {trace.n_layer} layers x {trace.n_expert} experts, "
        f"{trace.n_decode} decoded tokens after {trace.n_prompt} of prompt",
        "",
        "| budget | k | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = [f"{row['misses'][name]:.2f}" for name in names]
        lines.append(f"| {100 * row['share']:g}% | {row['k']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
