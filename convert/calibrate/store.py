"""Statistics in a GGUF: which tensors and keys, written by update_gguf and read back with every shape checked."""

from __future__ import annotations

from pathlib import Path

from .statistics import Statistics


def write_statistics(path: Path, statistics: Statistics, *, out: Path | None = None) -> None:
    """Put ``statistics`` into the GGUF at ``path``, or into a copy at ``out``, replacing older ones."""
    raise NotImplementedError


def read_statistics(path: Path) -> Statistics | None:
    """The statistics in a GGUF; None if it has none.

    Raises ModelFormatError if they do not fit the model (``inputs`` are never stored).
    """
    raise NotImplementedError
