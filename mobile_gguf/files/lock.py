"""Advisory locks between processes, released by the system when their holder ends.

From the standard library alone: the engine's builder takes one before any dependency is installed. A lock
file is locked as ``filelock`` does it, so that downloads exclude huggingface_hub's. Where a file system has
no locks (Lustre without ``-o flock``, NFS without lockd, some of FUSE) everything goes on without: who works
alone there must not be refused.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_HELD = (errno.EACCES, errno.EDEADLK, 36)  # of Windows' C runtime, where EDEADLOCK is 36
_POLL_SECONDS = 0.1
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def exclusive(path: Path, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file ``path`` for the time of the block; ``on_wait`` is called once if another holds it.

    What ``on_wait`` raises ends the waiting. The file may be removed by its holder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path, on_wait)
    try:
        yield
    finally:
        os.close(descriptor)  # releases the lock


def try_lock(descriptor: int) -> bool:
    """Lock a file that is written in place; False if another process has it locked.

    Not on Windows, where a lock would keep others from reading, and an open file is not replaced anyway.
    """
    return os.name == "nt" or try_hold(descriptor)


def is_still(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the file that was opened: a holder may have removed or renamed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _acquire(path: Path, on_wait: Callable[[], None]) -> int:
    waits = False
    while True:
        descriptor = os.open(path, _FLAGS, 0o644)
        try:
            while not try_hold(descriptor):
                if not waits:
                    on_wait()
                waits = True
                time.sleep(_POLL_SECONDS)
            if is_still(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have gone with its folder


if sys.platform == "win32":
    import msvcrt

    def try_hold(descriptor: int) -> bool:
        """Lock a file that is there to be locked, and not read; False if somebody has it locked."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in (*_NO_LOCKS, errno.EINVAL):
                raise
        return True

else:
    import fcntl

    def try_hold(descriptor: int) -> bool:
        """Lock a file that is there to be locked, and not read; False if somebody has it locked."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True
