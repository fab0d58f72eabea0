"""Pictures of curves: PNG or SVG, by the file's name; whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, UsageError, install_hint

from .atomic import complete_or_absent

FORMATS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise UsageError or MobileError if ``path`` cannot become a plot, before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path} must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    _figure_class()


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches. Raises MobileError where matplotlib is not installed."""
    return _figure_class()(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write it in the format that the file's name asks for."""
    with complete_or_absent(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=120)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MobileError(f"--plot needs matplotlib: {install_hint('calibrate')}") from None
    return Figure
