"""One total: what a whole process may take, and what of it is left for a model.

    total = this process | conversations that are kept in memory | weights, KV, buffers, experts, a reserve

The first two are set aside here; the rest is divided as any other free memory is, and is a limit that holds:
a budget that was asked for is cut to it, as under a cgroup's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.errors import BudgetError
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import MIB, Size, format_bytes

from .machine import PROMISE, Memory
from .spare import resident_bytes

# Conversations kept in memory, where no total is promised: bytes of all states together.
AUTO_CACHE_BYTES = 2 << 30
# Python, the libraries, a server or a screen, and the child that renders templates.
_PROCESS_BYTES = 192 * MIB
_STILL_TO_COME = 64 * MIB
_CACHE_SHARE = 16


@dataclass(frozen=True)
class Promise:
    """A total in bytes, and what of it is no model's."""

    total_bytes: int
    process_bytes: int
    cache_bytes: int


def make_promise(total_bytes: int, cache: Size | str, taken_bytes: int) -> Promise:
    """What ``total_bytes`` leave aside, ``taken_bytes`` of them being in use; ``cache``: as ``prefix_cache``.

    Raises BudgetError where nothing is left.
    """
    process = max(_PROCESS_BYTES, taken_bytes + _STILL_TO_COME)
    kept = cache_bytes(cache)
    if isinstance(cache, Size) and cache.is_auto:
        kept = min(kept, total_bytes // _CACHE_SHARE)
    if process + kept >= total_bytes:
        kept_too = f" and {format_bytes(kept)} of kept conversations" if kept else ""
        raise BudgetError(
            f"--memory {format_bytes(total_bytes)} has no room for a model: the process itself takes "
            f"{format_bytes(process)}{kept_too}"
        )
    return Promise(total_bytes, process, kept)


def cache_bytes(cache: Size | str) -> int:
    """The bytes that ``prefix_cache`` asks for."""
    return (cache.n_bytes or AUTO_CACHE_BYTES) if isinstance(cache, Size) else 0


def promised(options: LoadOptions, free: Memory, root: Path = Path("/")) -> Memory:
    """What a load with these options has of the memory that is free: no more than was promised.

    ``root`` is where this process's own memory is looked up. Raises BudgetError.
    """
    total = options.memory.n_bytes
    if total is None:
        return free
    promise = make_promise(total, options.prefix_cache, resident_bytes(root))
    left = total - promise.process_bytes - promise.cache_bytes
    if left > free.available_bytes:
        return Memory(free.available_bytes, free.total_bytes, free.source, promise)
    return Memory(left, total, f"{PROMISE}{format_bytes(total)}", promise)
