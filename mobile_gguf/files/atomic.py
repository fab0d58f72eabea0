"""Files that are complete or absent, and a disk's refusal in one line."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mobile_gguf.errors import MobileError
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import why

from .lock import is_still, try_lock

_DATA_REMEDY = ", or set XDG_DATA_HOME and XDG_CACHE_HOME to another disk"
_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_IN_USE = (5, 32)  # Windows' ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION
_OPEN_SECONDS, _POLL_SECONDS = 1.0, 0.02


class WriterBusyError(MobileError):
    """Another process is writing the same file at this moment."""


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it becomes ``path`` if the block ends well and is removed if
    not.

    The temporary name is fixed, so that what a killed process left behind is overwritten by the next one:
    two writers of one path need a lock. Raises MobileError when the disk refuses.
    """
    partial = partial_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            replace_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_file(path: Path, n_bytes: int, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Give an empty file to write, unbuffered; it becomes ``path`` if the block ends well, else it is
    removed.

    Until then it stands beside ``path`` as ``partial_path(path)``, locked: what a killed process left there
    is overwritten, and a second writer is refused. The data is on the disk before the name is. ``n_bytes`` is
    what will be written, ``mode`` who may read it, as far as the umask lets them. Raises MobileError when
    there is less space than that, or when the disk refuses, WriterBusyError.
    """
    partial = partial_path(path)
    with disk_errors(path, remedy=", or write to another disk"):
        descriptor = _open_locked(partial, path, mode)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            try:
                file.truncate(0)
                check_space(path, n_bytes)
                yield file
                os.fsync(descriptor)
                if os.name == "nt":
                    file.close()
                replace_file(partial, path)
            except BaseException:
                # while the lock is held: afterwards the name may be another writer's
                if os.name == "nt":
                    file.close()
                partial.unlink(missing_ok=True)
                raise
        _sync_directory(path.parent)


def replace_file(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target``, in place of what has it. Raises OSError.

    Windows refuses as long as somebody has either open, if only to read it: a second is waited.
    """
    until = time.monotonic() + _OPEN_SECONDS
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
        time.sleep(_POLL_SECONDS)


def partial_path(path: Path) -> Path:
    """Where a file stands until it is complete."""
    return path.with_name(path.name + _PARTIAL)


def remove_abandoned(folder: Path) -> None:
    """Remove partial files in ``folder`` that killed writers left there: nobody has them locked.

    Not on Windows, where nobody can tell. Raises OSError.
    """
    if os.name == "nt":
        return
    for partial in folder.glob(f"*{_PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if try_lock(descriptor) and is_still(descriptor, partial):
                    partial.unlink()
            finally:
                os.close(descriptor)


def check_space(path: Path, n_bytes: int) -> None:
    """Raise MobileError if a new file ``path`` of ``n_bytes`` bytes does not fit on its disk."""
    free = free_bytes(path)
    if n_bytes > free:
        raise MobileError(
            f"cannot write {path}: it needs {n_bytes} bytes ({format_bytes(n_bytes)}), its disk has {free}"
            f" free ({format_bytes(free)}): free some space there, or write to another disk"
        )


def free_bytes(path: Path) -> int:
    """What this user may still write beside ``path``, in bytes."""
    with disk_errors(path, remedy=""):
        return shutil.disk_usage(path.parent).free


@contextmanager
def disk_errors(path: Path, remedy: str = _DATA_REMEDY) -> Iterator[None]:
    """Turn an OSError of the block into a MobileError that names ``path`` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what = "the disk is full: free some space there"
        elif getattr(error, "winerror", None) in _IN_USE:
            what = "it cannot be written, or a program has it open: end that first"
        elif error.errno == errno.EFBIG:
            what = "it is larger than a file may be there (see `ulimit -f`): raise the limit"
        else:
            what = f"{why(error)}: check that the directory can be written"
        raise MobileError(f"cannot write {path}: {what}{remedy}") from error


def _open_locked(partial: Path, path: Path, mode: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(partial, flags, mode)
        try:
            if not try_lock(descriptor):
                raise WriterBusyError(f"cannot write {path}: another process is writing it now")
            # else its writer has just given it its name: what was opened is not ours to write
            if is_still(descriptor, partial):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return  # a directory cannot be opened there
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
