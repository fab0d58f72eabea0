"""A text's state as a file: what it fits, its tokens, and the bytes that are in ``Kept`` of the prefix cache.

    magic | length of the header | header, JSON | tokens, int32 | state | checkpoints | BLAKE2 of all of it

A header is believed for looking a text up; nothing goes to the engine before the whole file was checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .prefix_cache import Checkpoint, Kept

SUFFIX = ".session"
_MAGIC = b"mobile-gguf session 1\n"
_LENGTH = 4  # bytes that say the header's
_MAX_HEADER = 1 << 20
_DIGEST = 32
_AT_ONCE = 1 << 24  # bytes that are read or written by one call
_TOKEN = 4

Fits = dict[str, str]


class DamagedError(Exception):
    """The file is no session, or not what was written."""


@dataclass(frozen=True)
class Saved:
    """What a file says of itself: a text that continues where ``fits`` is what a loaded model says of itself.

    ``checkpoints`` are without their states. ``used_at`` is the file's time, in seconds.
    """

    path: Path
    fits: Fits
    model: str
    tokens: Sequence[int] = field(repr=False)
    n_big: int
    sizes: tuple[int, ...]  # of the state, and of each checkpoint
    checkpoints: tuple[Checkpoint, ...] | None
    n_bytes: int
    used_at: float


def name_of(fits: Fits, tokens: Sequence[int]) -> str:
    """The file's name: the same text of the same model has one."""
    digest = hashlib.blake2b(_json(fits), digest_size=16)
    digest.update(_packed(tokens))
    return digest.hexdigest() + SUFFIX


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _packed(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def pieces_of(fits: Fits, model: str, kept: Kept) -> list[memoryview]:
    """A file's bytes but for the digest, in order and not copied."""
    points = kept.checkpoints
    header = _json(
        {
            "fits": fits,
            "model": model,
            "n_tokens": len(kept.tokens),
            "n_big": kept.n_big,
            "state_bytes": int(kept.state.nbytes),
            "checkpoints": None if points is None else [[one.n_tokens, one.n_bytes] for one in points],
        }
    )
    head = _MAGIC + len(header).to_bytes(_LENGTH, "little") + header + _packed(kept.tokens)
    return [memoryview(head), *map(memoryview, _states(kept))]


def _states(kept: Kept) -> list[Any]:
    return [kept.state, *(one.state for one in kept.checkpoints or ())]


def file_bytes(pieces: Sequence[memoryview]) -> int:
    """The size of the file that they make."""
    return sum(len(one) for one in pieces) + _DIGEST


def write(file: BinaryIO, pieces: Sequence[memoryview]) -> None:
    """Write a whole file to an unbuffered one. Raises OSError."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for piece in pieces:
        for start in range(0, len(piece), _AT_ONCE):
            part = piece[start : start + _AT_ONCE]
            digest.update(part)
            _write_all(file, part)
    _write_all(file, memoryview(digest.digest()))


def _write_all(file: BinaryIO, part: memoryview) -> None:
    while part:
        part = part[file.write(part) :]


def read_head(path: Path) -> Saved:
    """What the file at ``path`` says of itself. Raises DamagedError, OSError."""
    with path.open("rb") as file:
        return _head_of(file, path)[0]


def _head_of(file: BinaryIO, path: Path) -> tuple[Saved, int]:
    """That, and where the states begin."""
    stat = os.fstat(file.fileno())
    n_fixed = len(_MAGIC) + _LENGTH
    start = file.read(n_fixed)
    n_header = int.from_bytes(start[len(_MAGIC) :], "little")
    if len(start) != n_fixed or not start.startswith(_MAGIC) or n_header > _MAX_HEADER:
        raise DamagedError
    try:
        header = json.loads(file.read(n_header))
        fits, model = dict(header["fits"]), str(header["model"])
        n_tokens, n_big, state = (int(header[key]) for key in ("n_tokens", "n_big", "state_bytes"))
        points = header["checkpoints"]
        pairs = None if points is None else [(int(at), int(n)) for at, n in points]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError from None
    sizes = (state, *(n for _, n in pairs or ()))
    at = n_fixed + n_header + _TOKEN * n_tokens
    if min(n_tokens, n_big, *sizes) < 0 or stat.st_size != at + sum(sizes) + _DIGEST:
        raise DamagedError
    packed = file.read(_TOKEN * n_tokens)
    if len(packed) != _TOKEN * n_tokens:  # it shrinks while it is read
        raise DamagedError
    tokens = array("i", packed)
    marks = None if pairs is None else tuple(Checkpoint(n, b"") for n, _ in pairs)
    saved = Saved(path, fits, model, tokens, n_big, sizes, marks, stat.st_size, stat.st_mtime)
    return saved, at


def read(path: Path) -> tuple[Saved, Kept]:
    """The file at ``path`` as what can be put into a context, after all of it was checked.

    Its states are mapped and not read: they take no memory but the system's page cache, and last as long as
    they are used, whatever becomes of the file's name. Raises DamagedError, OSError.
    """
    import numpy as np

    with path.open("rb") as file:
        saved, at = _head_of(file, path)
        _check(file, saved.n_bytes)
        states = []
        for n in saved.sizes:
            states.append(np.memmap(file, np.uint8, "r", at, (n,)) if n else np.empty(0, np.uint8))
            at += n
    marks = saved.checkpoints
    points = None
    if marks is not None:
        points = [Checkpoint(one.n_tokens, state) for one, state in zip(marks, states[1:], strict=True)]
    return saved, Kept(list(saved.tokens), saved.n_big, states[0], points, is_saved=True)


def _check(file: BinaryIO, n_bytes: int) -> None:
    file.seek(0)
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for part in _parts(file, n_bytes - _DIGEST):
        digest.update(part)
    if file.read(_DIGEST) != digest.digest():
        raise DamagedError


def _parts(file: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    while n_bytes > 0:
        part = file.read(min(n_bytes, _AT_ONCE))
        if not part:
            raise DamagedError
        n_bytes -= len(part)
        yield part
