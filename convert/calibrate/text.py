"""The text that a model is calibrated on: the user's files, or a built-in one of our own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from mobile_gguf.errors import UsageError
from mobile_gguf.wording import why

from .samples import N_PROMPT

DEFAULT_NAME = "built-in text"
# Tokens of a block, and the least that is worth one.
BLOCK, MIN_BLOCK = 192, 2 * N_PROMPT
# Of so many blocks one is held out; with fewer blocks nothing can be said of it.
HELD_OUT_EVERY, MIN_BLOCKS = 4, 12


@dataclass(frozen=True)
class Text:
    """A name for people, the hash of all bytes, and the texts themselves."""

    name: str
    sha256: str
    parts: tuple[str, ...]


def read_text(files: Sequence[Path]) -> Text:
    """The texts of ``files`` (UTF-8), the built-in one if there are none. Raises UsageError."""
    if not files:
        folder = resources.files(__name__.rpartition(".")[0]).joinpath("texts")
        found = sorted(
            (item for item in folder.iterdir() if item.name.endswith(".txt")), key=lambda f: f.name
        )
        return _text(DEFAULT_NAME, [item.read_bytes() for item in found], [item.name for item in found])
    raw = []
    for path in files:
        try:
            raw.append(path.read_bytes())
        except OSError as error:
            raise UsageError(f"cannot read the text {path}: {why(error)}") from None
    return _text(", ".join(path.name for path in files), raw, [str(path) for path in files])


def _text(name: str, raw: Sequence[bytes], names: Sequence[str]) -> Text:
    digest = hashlib.sha256()
    parts = []
    for data, source in zip(raw, names, strict=True):
        # Lengths keep two files apart from one that holds both.
        digest.update(len(data).to_bytes(8, "little") + data)
        try:
            parts.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise UsageError(f"the text {source} is not UTF-8") from None
    return Text(name, digest.hexdigest(), tuple(parts))


def cut_blocks(
    text: Text, tokenize: Callable[[str], list[int]], start: list[int], n_tokens: int
) -> list[list[int]]:
    """Equally long blocks of token ids, at most ``n_tokens`` in all, taken from the parts in turn.

    ``start`` opens each block (a beginning-of-sequence token, or nothing). Blocks of a short text are
    shorter. Raises UsageError if even so there are too few.
    """
    streams = [tokenize(part) for part in text.parts]
    total = min(sum(map(len, streams)), n_tokens)
    length = min(BLOCK, total // MIN_BLOCKS) - len(start)
    if length < MIN_BLOCK:
        least = MIN_BLOCKS * (MIN_BLOCK + len(start))
        raise UsageError(
            f"{text.name} gives {total} tokens and calibration needs at least {least}: give more "
            "text, or more --tokens"
        )
    pieces = [
        [start + stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        for stream in streams
    ]
    mixed: list[list[int]] = []
    # In turn, so that a limit on tokens leaves some of every part.
    for row in range(max(map(len, pieces), default=0)):
        mixed += [blocks[row] for blocks in pieces if row < len(blocks)]
    chosen = mixed[: max(n_tokens // (length + len(start)), 1)]
    if len(chosen) < HELD_OUT_EVERY * 2:
        raise UsageError(f"{text.name} gives only {len(chosen)} blocks of {length} tokens: give longer texts")
    return chosen


def held_out(n_blocks: int) -> list[int]:
    """Which blocks the head is not fitted on: one in four, drawn by the same lot every time."""
    order = np.random.default_rng(n_blocks).permutation(n_blocks)
    return sorted(order[: n_blocks // HELD_OUT_EVERY].tolist())
