"""The disk beside the arms: its bandwidth for expert-sized reads, and keeping the page cache out of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.errors import MobileError
from mobile_gguf.wording import why

SECTOR = 4096
DEFAULT_THREADS = 8


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of parallel random reads; ``direct`` says whether they bypassed the page cache."""

    bytes_per_s: float
    n_threads: int
    block_bytes: int
    direct: bool


def measure_bandwidth(
    path: Path, block_bytes: int, *, n_threads: int = DEFAULT_THREADS, seconds: float = 2.0, seed: int = 0
) -> Bandwidth:
    """Read blocks of ``block_bytes`` (rounded up to sectors) at random offsets of ``path`` for a while.

    Unbuffered where the file system allows it. Raises MobileError if the file cannot be read.
    """
    block_bytes = -(-block_bytes // SECTOR) * SECTOR
    n_blocks = path.stat().st_size // SECTOR - block_bytes // SECTOR
    if n_blocks < 0:
        raise MobileError(f"{path} is smaller than one block of {block_bytes} bytes: nothing to measure")
    descriptor, direct = _open_unbuffered(path)
    if not direct:
        drop_page_cache(path)
    n_read = [0] * n_threads
    problems: list[OSError] = []
    deadline = time.perf_counter() + seconds

    def read_until_deadline(index: int) -> None:
        pick = random.Random(seed * n_threads + index)
        # an anonymous mapping is page-aligned, as unbuffered reads want it
        with mmap.mmap(-1, block_bytes) as buffer:
            try:
                while True:  # once at least, however late the thread comes
                    n_read[index] += os.preadv(descriptor, [buffer], pick.randint(0, n_blocks) * SECTOR)
                    if time.perf_counter() >= deadline:
                        break
            except OSError as error:
                problems.append(error)

    started = time.perf_counter()
    threads = [threading.Thread(target=read_until_deadline, args=(index,)) for index in range(n_threads)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        elapsed = time.perf_counter() - started
        os.close(descriptor)
    if problems:
        raise MobileError(f"cannot measure the disk on {path}: {why(problems[0])}")
    if not direct:
        drop_page_cache(path)
    return Bandwidth(sum(n_read) / elapsed, n_threads, block_bytes, direct)


def _open_unbuffered(path: Path) -> tuple[int, bool]:
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            descriptor = os.open(path, os.O_RDONLY | flag)
            with mmap.mmap(-1, SECTOR) as buffer:
                os.preadv(descriptor, [buffer], 0)
            return descriptor, True
        except OSError:
            pass  # tmpfs and some network file systems refuse; measured through the page cache then
    try:
        return os.open(path, os.O_RDONLY), False
    except OSError as error:
        raise MobileError(f"cannot read {path}: {error.strerror}") from None


def drop_page_cache(path: Path) -> int | None:
    """Ask the kernel to forget the file's cached pages; returns how many bytes stay (None: unknown).

    Pages that a process maps, or that are dirty, stay; nothing else on the machine is affected.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return cached_bytes(path)


def cached_bytes(path: Path) -> int | None:
    """How much of the file is in the page cache; None where the system cannot say."""
    import numpy as np

    size = path.stat().st_size
    if not hasattr(os, "posix_fadvise") or size == 0:
        return None if size else 0
    libc = ctypes.CDLL(None, use_errno=True)
    n_pages = -(-size // mmap.PAGESIZE)
    state = np.zeros(n_pages, dtype=np.uint8)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, dtype=np.uint8)
        address, target = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(state.ctypes.data)
        status = libc.mincore(address, ctypes.c_size_t(size), target)
        # the mapping cannot be closed while an array looks at it
        del view
    return int((state & 1).sum()) * mmap.PAGESIZE if status == 0 else None
