"""The trade-off curves as a picture: PNG or SVG, by the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobile_gguf.files.plots import new_figure, save_figure
from mobile_gguf.options.words import CONFIDENCE, HEAD

from .curves import BIG, LITTLE, Point
from .price import Prices, hull_names


def plot(points: list[Point], prices: Prices | None, path: Path, title: str) -> None:
    """Draw mean KL, top-1 agreement and perplexity against expert bytes, and write them to ``path``.

    Of rungs' prices KL against missed bytes.
    """
    n = 3 if prices is None else 4
    figure = new_figure(13 * n / 3, 4.2)
    axes = figure.subplots(1, n)
    if prices is not None:
        _ladder(axes[3], prices)
    big = next(point for point in points if point.setting.kind == BIG)
    _curve(axes[0], points, big, "mean KL to big (nats)", lambda point: point.kl)
    _curve(axes[1], points, big, "top-1 agreement with big", lambda point: point.agreement)
    _curve(axes[2], points, big, "perplexity, ratio to big", lambda point: point.perplexity_ratio)
    axes[2].axhline(1.01, color="0.6", linestyle=":", linewidth=1)
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def _curve(axis: Any, points: list[Point], big: Point, label: str, value: Any) -> None:
    styles = {HEAD: "o-", CONFIDENCE: "s--"}
    for i, k in enumerate(sorted({point.setting.little_k for point in points if point is not big})):
        for kind, style in styles.items():
            if all(point.setting.kind != kind for point in points):
                continue
            line = [p for p in points if p.setting.little_k == k and p.setting.kind in (kind, LITTLE)]
            line = sorted([*line, big], key=lambda p: p.expert_bytes)
            shares = [point.expert_bytes / big.expert_bytes for point in line]
            color = f"C{2 * i + (kind == CONFIDENCE)}"
            axis.plot(
                shares, [value(p) for p in line], style, color=color, ms=3.5, label=f"{kind}, little-k {k}"
            )
    axis.set_xlabel("expert bytes a token, share of big")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _ladder(axis: Any, prices: Prices) -> None:
    for i, (share, rows) in enumerate(prices.rows.items()):
        hull = hull_names(rows)
        line = sorted((row for row in rows if row.rung in hull), key=lambda row: row.demand_bytes)
        label = f"{share:.3g} of experts in memory"
        for of_rows, style, name in ((line, "-", label), (rows, "o", None)):
            kib = [row.demand_bytes / 1024 for row in of_rows]
            axis.plot(kib, [row.kl for row in of_rows], style, color=f"C{i}", ms=3.5, label=name)
        for row in line:
            axis.annotate(row.rung, (row.demand_bytes / 1024, row.kl), fontsize=6)
    axis.set_xlabel("KiB missed a token")
    axis.set_ylabel("mean KL to exact (nats)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
