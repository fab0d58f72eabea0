"""A fork copies a model's memory and none of its threads: in the child nothing of it may be used or freed."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, Protocol

from mobile_gguf.errors import EngineError


class Owner(Protocol):
    """What holds handles of the engine, or a lock that another thread may hold at a fork."""

    def _abandon(self) -> None:
        """In a forked child, before anything else: refuse every use and free nothing. Must not raise."""
        ...


_PAUSE_HARD = 2  # enum omp_pause_resource_t: give all threads back

_libraries: list[Any] = []
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def abandon_in_children(owner: Owner) -> None:
    """Call ``owner._abandon()`` in every process that is forked from this one while it lives."""
    _owners.add(owner)


def forked() -> EngineError:
    """The error for a use of what was loaded before a fork."""
    return EngineError("this model was loaded before a fork: load it in the child process")


def let_children_load(library: Any) -> None:
    """Make a fork's child able to load what it uses itself, with the engine's library that both have.

    OpenMP keeps the threads of a thread that computed; its copy in a child would wait for them, who are gone.
    """
    pause = getattr(library, "omp_pause_resource_all", None)  # not built with OpenMP: threads of ggml's own
    if pause is not None and library not in _libraries:
        pause.restype, pause.argtypes = ctypes.c_int, [ctypes.c_int]
        _libraries.append(library)


def _give_threads_back() -> None:
    for library in _libraries:
        library.omp_pause_resource_all(_PAUSE_HARD)


def _abandon() -> None:
    for owner in list(_owners):
        owner._abandon()
    _owners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_give_threads_back, after_in_child=_abandon)
