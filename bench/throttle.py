"""A slow disk: a cgroup (version 1, blkio) whose processes read so many bytes a second and no more."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from mobile_gguf.errors import MobileError
from mobile_gguf.memory.cap import CgroupError, remove_cgroup

_ROOT = Path("/sys/fs/cgroup/blkio")
_LIMIT = "blkio.throttle.read_bps_device"
_serial = itertools.count()


@contextlib.contextmanager
def slow_disk(path: Path, bytes_per_s: int) -> Iterator[Path]:
    """A group for reading the disk of ``path``, unbuffered or not: process ids go into its ``cgroup.procs``.

    Raises MobileError where it cannot be made.
    """
    folder = _ROOT / f"mobile-gguf-bench-{os.getpid()}-{next(_serial)}"
    try:
        folder.mkdir()
        (folder / _LIMIT).write_text(f"{disk_of(path)} {bytes_per_s}", encoding="ascii")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise MobileError(
            f"the disk cannot be slowed here: {error.strerror} ({error.filename}); it takes root and a"
            " version 1 blkio controller"
        ) from None
    try:
        yield folder
    finally:
        with contextlib.suppress(CgroupError):
            remove_cgroup(folder)


def disk_of(path: Path) -> str:
    """The whole disk that a file lies on, as MAJOR:MINOR: limits are not for partitions."""
    number = os.stat(path).st_dev
    found = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (found / "partition").exists():
        found = found.parent
    return (found / "dev").read_text(encoding="ascii").strip()
