"""The disk as the expert store uses it: unbuffered reads of expert-sized pieces, alone and many at a time."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mobile_gguf.errors import MobileError
from mobile_gguf.wording import why

from .machine import Rate

SECTOR = 4096
CHUNK_BYTES = 512 * 1024  # the store splits longer reads
_ROUNDS = 6


def disk_name(path: Path) -> str:
    """What measurements of a path's disk are called: its file system's device number."""
    return f"disk.{os.stat(path).st_dev}"


def read_size(piece_bytes: int, *, aligned: bool) -> int:
    """Bytes of one read for a piece of this size: whole sectors, at most a chunk. A piece that does not begin
    at a sector, not ``aligned``, is taken to reach over one more."""
    reach = piece_bytes if aligned else piece_bytes + SECTOR - 1
    return min(CHUNK_BYTES, -(-reach // SECTOR) * SECTOR)


def measure_reads(
    path: Path, n_bytes: int, n_threads: int, seconds: float, check: Callable[[], None] = lambda: None
) -> Rate:
    """Seconds per read of ``n_bytes`` at random offsets of ``path``, ``n_threads`` threads reading at once.

    Quartiles are over rounds, in which every thread reads for a while. Raises MobileError if the file cannot
    be read or is too small, or this Python cannot read at an offset (Windows).
    """
    if not hasattr(os, "preadv"):
        raise MobileError(f"the disk of {path} cannot be measured: this Python has no os.preadv")
    n_places = os.stat(path).st_size // SECTOR - -(-n_bytes // SECTOR)
    if n_places <= 0:
        raise MobileError(f"{path} is too small to measure its disk with reads of {n_bytes} bytes")
    descriptor = _open(path)
    try:
        rounds = []
        for index in range(_ROUNDS):
            check()
            rounds.append(_round(path, descriptor, n_bytes, n_places, n_threads, seconds / _ROUNDS, index))
    finally:
        os.close(descriptor)
    rounds.sort()
    mean = sum(rounds) / len(rounds)
    low, high = rounds[len(rounds) // 4], rounds[-1 - len(rounds) // 4]
    return Rate(mean, min(mean, low), max(mean, high))


def _round(
    path: Path, descriptor: int, n_bytes: int, n_places: int, n_threads: int, seconds: float, seed: int
) -> float:
    counts = [0] * n_threads
    spent = [0.0] * n_threads
    problems: list[str] = []
    deadline = time.perf_counter() + seconds

    def read(index: int) -> None:
        pick = random.Random(seed * 64 + index)
        # an anonymous mapping is page-aligned, as unbuffered reads want it
        with mmap.mmap(-1, -(-n_bytes // SECTOR) * SECTOR) as buffer:
            started = time.perf_counter()
            try:
                while counts[index] < 2 or time.perf_counter() < deadline:
                    if not os.preadv(descriptor, [buffer], pick.randrange(n_places) * SECTOR):
                        problems.append("the file has become shorter")
                        return
                    counts[index] += 1
            except OSError as error:
                problems.append(why(error))
            spent[index] = time.perf_counter() - started

    threads = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise MobileError(f"cannot measure the disk on {path}: {problems[0]}")
    return sum(spent) / max(1, sum(counts))


def _open(path: Path) -> int:
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            descriptor = os.open(path, os.O_RDONLY | flag)
        except OSError:
            pass  # some file systems refuse: the store reads through the page cache there as well
        else:
            try:
                with mmap.mmap(-1, SECTOR) as buffer:
                    os.preadv(descriptor, [buffer], 0)
                return descriptor
            except OSError:
                os.close(descriptor)
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise MobileError(f"cannot read {path}: {error.strerror}") from None
