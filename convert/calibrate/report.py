"""A calibration for people: a table, and what it says in words."""

from __future__ import annotations

from mobile_gguf.options.words import CONFIDENCE, HEAD
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import markdown_table

from .correction import Maps
from .curves import BIG, LITTLE, Point, bytes_at_kl
from .price import Prices, hull_names
from .run import Calibration

_COLUMNS = (
    "setting",
    "little-k",
    "mean KL",
    "top-1",
    "perplexity",
    "vs big",
    "big",
    "expert bytes",
    "vs big",
)


def lines(result: Calibration) -> list[str]:
    """The whole report; the table is Markdown."""
    fit, head, default = result.fit, result.fit.head, result.default
    big = next(point for point in result.points if point.setting.kind == BIG)
    held = "within 1% of" if result.within else "NOT within 1% of"
    return [
        f"text           {result.text.name}, {result.n_tokens} tokens",
        f"important      {100 * fit.positives:.0f}% of tokens: KL of big and little above {head.kl:.3g}",
        f"head           AUC {head.auc:.3f} on {fit.n_held_out} held-out tokens "
        f"(confidence, after the pass: {fit.auc_confidence:.3f})",
        f"default        {_name(default)}, little-k {default.setting.little_k}: perplexity {held} big "
        f"({_percent(default.perplexity_ratio)}), {_share(default, big)} of its expert bytes",
        *([corrections_line(result.maps)] if result.maps is not None else []),
        "",
        *table(result.points),
        "",
        *comparison(result.points),
        *(["", *price_table(result.prices)] if result.prices is not None else []),
    ]


def corrections_line(maps: Maps) -> str:
    """Which maps of little tokens were found."""
    found = ", ".join(f"{k} experts" + (f" with mass {mass}" if mass else "") for k, mass in maps.ways)
    return f"corrections    of little tokens with {found}: {format_bytes(maps.n_bytes)}"


def price_table(prices: Prices) -> list[str]:
    """The rungs' prices as Markdown, a hull's rungs marked."""
    heads = (
        "budget",
        "rung",
        "",
        "mean KL",
        "top-1",
        "perplexity",
        "KiB missed a token",
        "of exact",
        "read idle",
    )
    rows = []
    for share, of_share in prices.rows.items():
        exact = next(row for row in of_share if row.rung == "exact")
        hull = hull_names(of_share)
        rows += [
            (
                f"{share:.3g}", row.rung, "hull" if row.rung in hull else "", f"{row.kl:.4f}",
                f"{row.agreement:.1%}", _percent(row.perplexity_ratio), f"{row.demand_bytes / 1024:.0f}",
                f"{row.demand_bytes / max(1.0, exact.demand_bytes):.0%}", f"{row.idle_bytes / 1024:.0f}",
            )
            for row in of_share
        ]  # fmt: skip
    left_out = [f"{rung} was left out: {reason}" for rung, reason in prices.left_out.items()]
    return ["rungs of the ladder, step by step; budgets are shares of all experts, KiB are of a token:", "",
            *markdown_table([heads, *rows], left=(0, 1, 2)), *left_out]  # fmt: skip


def table(points: list[Point]) -> list[str]:
    """The points as Markdown, bytes in KiB a token."""
    big = next(point for point in points if point.setting.kind == BIG)
    rows = [
        (
            _name(point),
            str(point.setting.little_k),
            f"{point.kl:.4f}",
            f"{point.agreement:.1%}",
            f"{point.perplexity:.2f}",
            f"{_percent(point.perplexity_ratio)} ± {100 * point.perplexity_error:.1f}",
            f"{point.big_share:.0%}",
            f"{point.expert_bytes / 1024:.0f} KiB",
            _share(point, big),
        )
        for point in sorted(points, key=_order)
    ]
    return markdown_table([_COLUMNS, *rows])


def comparison(points: list[Point]) -> list[str]:
    """Head against confidence: expert bytes a token at the same mean KL."""
    found = []
    for point in points:
        if point.setting.kind == HEAD and point.setting.little_k == min(p.setting.little_k for p in points):
            head, confidence = (bytes_at_kl(points, kind, point.kl) for kind in (HEAD, CONFIDENCE))
            if head is not None and confidence is not None:
                found.append((point.kl, head, confidence))
    if all(point.setting.kind != CONFIDENCE for point in points):
        return ["confidence needs a memory that can be rolled back, which this model has not"]
    if not found:
        return ["head and confidence have no mean KL in common"]
    shown = [
        f"mean KL {kl:.4f}: head {head / 1024:.0f} KiB, confidence {confidence / 1024:.0f} KiB "
        f"({head / confidence - 1:+.0%})"
        for kl, head, confidence in found
    ]
    return ["expert bytes a token at equal mean KL, cheapest little-k each:", *shown]


def _order(point: Point) -> tuple[int, int, float, float]:
    setting = point.setting
    kinds = (BIG, LITTLE, CONFIDENCE, HEAD)
    return (
        -setting.little_k * (setting.kind == BIG) or setting.little_k,
        kinds.index(setting.kind),
        setting.share,
        setting.value,
    )


def _name(point: Point) -> str:
    setting = point.setting
    if setting.kind == HEAD:
        return f"head > {setting.value:.3f} ({setting.share}%)"
    return f"confidence < {setting.value:g}" if setting.kind == CONFIDENCE else setting.kind


def _share(point: Point, big: Point) -> str:
    return f"{point.expert_bytes / big.expert_bytes:.0%}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"
