"""A heat map of how often each expert is used: a row for each layer, a column for each expert.

What is drawn is a share in units of an even share (top-k / experts), so that models compare.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TextIO

import numpy as np
import numpy.typing as npt

WIDTH = 80
# Bounds of the steps, in even shares; a value belongs to the last bound that it reaches.
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
ASCII, UNICODE = " .:-+*#@", " ░░▒▒▓▓█"
# xterm's 256 colours, from blue over violet and orange to yellow
COLOURS = (17, 19, 57, 91, 161, 203, 214, 227)
_WIDEST_CELL = 4


def is_fancy(stream: TextIO) -> bool:
    """Whether to draw with colours and block characters: a terminal that shows both, and no NO_COLOR."""
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return (
        stream.isatty()
        and "NO_COLOR" not in os.environ
        and os.environ.get("TERM") != "dumb"
        and encoding == "utf8"
    )


def heat_map(hotness: npt.NDArray[np.float32], layers: Sequence[int], *, fancy: bool) -> list[str]:
    """Lines of at most 80 columns for ``hotness`` [n_layer, n_expert], an expert's share of tokens.

    ``layers`` are the layers' numbers. Experts that do not fit side by side share a column, which shows their
    mean. A layer that was never run says so.
    """
    n_expert = hotness.shape[1]
    label = max(len(str(layer)) for layer in layers)
    room = WIDTH - label - 3
    n_bin = math.ceil(n_expert / room)
    starts = np.arange(0, n_expert, n_bin)
    cell = min(_WIDEST_CELL, room // len(starts))
    lines = [_header(n_expert, n_bin, cell, len(starts), label)]
    for layer, row in zip(layers, hotness, strict=True):
        if not row.any():
            lines.append(f"{layer:>{label}} | not run")
            continue
        sizes = np.diff([*starts, n_expert])
        means = np.add.reduceat(row, starts) / sizes * n_expert / row.sum()
        cells = (_cell(step_of(value), cell, fancy) for value in means.tolist())
        lines.append(f"{layer:>{label}} |{''.join(cells)}|")
    return [*lines, _legend(label, fancy)]


def step_of(value: float) -> int:
    """Which step ``value``, in even shares, belongs to."""
    return max(step for step, bound in enumerate(STEPS) if value >= bound)


def _cell(step: int, width: int, fancy: bool) -> str:
    text = (UNICODE if fancy else ASCII)[step] * width
    return f"\033[38;5;{COLOURS[step]}m{text}\033[0m" if fancy else text


def _header(n_expert: int, n_bin: int, cell: int, n_columns: int, label: int) -> str:
    first, last = "expert 0", str(n_expert - 1)
    width = cell * n_columns
    space = " " * (label + 2)
    if len(first) + len(last) + 1 > width:
        return f"{space}experts 0 to {last}"
    shared = f", {n_bin} to a column" if n_bin > 1 else ""
    return f"{space}{first + shared}{last:>{width - len(first + shared)}}"


def _legend(label: int, fancy: bool) -> str:
    marks = (f"[{_cell(step, 1, fancy)}]{bound:g}" for step, bound in enumerate(STEPS))
    return " " * (label + 2) + " ".join(marks) + " x an even share"
