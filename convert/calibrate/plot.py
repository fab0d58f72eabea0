"""The trade-off curves as a picture: PNG or SVG, by the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, UsageError, install_hint
from mobile_gguf.files.atomic import complete_or_absent
from mobile_gguf.options.words import CONFIDENCE, HEAD

from .curves import BIG, LITTLE, Point

FORMATS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise UsageError or MobileError if ``path`` cannot become a plot, before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path} must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    _figure_class()


def plot(points: list[Point], path: Path, title: str) -> None:
    """Draw mean KL, top-1 agreement and perplexity against expert bytes, and write them to ``path``."""
    figure = _figure_class()(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    big = next(point for point in points if point.setting.kind == BIG)
    _curve(axes[0], points, big, "mean KL to big (nats)", lambda point: point.kl)
    _curve(axes[1], points, big, "top-1 agreement with big", lambda point: point.agreement)
    _curve(axes[2], points, big, "perplexity, ratio to big", lambda point: point.perplexity_ratio)
    axes[2].axhline(1.01, color="0.6", linestyle=":", linewidth=1)
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    with complete_or_absent(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=120)


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


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MobileError(f"--plot needs matplotlib: {install_hint('calibrate')}") from None
    return Figure
