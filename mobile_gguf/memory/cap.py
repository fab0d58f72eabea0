"""Memory cgroups of our own, to cap a child process: version 1 and version 2.

A group is made below the innermost enclosing group that has a memory limit (or at the top of the
hierarchy if none has), so that a cap never lets anything out of a limit that already holds.
Linux only; where the hierarchy cannot be written, CgroupError says why and what would help.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.errors import MobileError
from mobile_gguf.wording import why

from .cgroup import cgroup_directories, read_number, read_text
from .machine import cgroup_limits

_V1_LIMIT, _V1_SWAP_LIMIT = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
_V2_LIMIT, _V2_SWAP_LIMIT = "memory.max", "memory.swap.max"
_REMOVE_ATTEMPTS = 50
_REMOVE_PAUSE_S = 0.02

_serial = itertools.count()


class CgroupError(MobileError):
    """This process may not make or use a memory cgroup; the text says why."""


@dataclass(frozen=True)
class MemoryCgroup:
    """A memory cgroup with a hard limit, made by ``create_memory_cgroup``; a context manager that removes it.

    ``directory`` is the group's own; ``limit_bytes`` counts anonymous memory and page cache alike.
    """

    directory: Path
    version: int
    limit_bytes: int

    def attach(self, pid: int) -> None:
        """Move a process in; what it allocates from now on counts here. Raises CgroupError."""
        _write(self.directory / "cgroup.procs", str(pid))

    def peak_bytes(self) -> int | None:
        """The most bytes ever charged; None on kernels that do not keep it (version 2 before 5.19)."""
        return read_number(
            self.directory / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        )

    def oom_kills(self) -> int:
        """How many processes the kernel killed here for want of memory (0 if it does not say)."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return _pairs(self.directory / name).get("oom_kill", 0)

    def remove(self) -> None:
        """Remove the group; its processes must have ended. Raises CgroupError if it stays busy.

        Nothing is killed here: who started the processes ends them.
        """
        remove_cgroup(self.directory)

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def remove_cgroup(directory: Path) -> None:
    """Remove a group of whatever controller, whose processes must have ended. Raises CgroupError."""
    problem = ""
    for attempt in range(_REMOVE_ATTEMPTS):
        try:
            # the kernel's files in it go with the directory
            os.rmdir(directory)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            problem = why(error)
        # a process that has been waited for can still be leaving its group
        if attempt + 1 < _REMOVE_ATTEMPTS:
            time.sleep(_REMOVE_PAUSE_S)
    raise CgroupError(f"cannot remove the cgroup {directory} ({problem}): end its processes, then `rmdir` it")


def create_memory_cgroup(
    limit_bytes: int, name: str = "mobile-gguf", *, root: Path = Path("/")
) -> MemoryCgroup:
    """Make an empty cgroup whose members together may hold ``limit_bytes`` and no swap beyond it.

    Version 1 is used where its memory controller is mounted, else version 2. ``root`` is where
    ``proc`` and ``sys`` are looked up. Raises CgroupError with the reason if it may not be done.
    """
    if limit_bytes <= 0:
        raise CgroupError(f"a memory limit must be more than 0 bytes, not {limit_bytes}")
    parents, version = _candidate_parents(root)
    if not parents:
        raise CgroupError("memory cannot be capped here: no memory cgroup hierarchy is mounted (needs Linux)")
    reasons = []
    for parent in parents:
        directory = parent / f"{name}-{os.getpid()}-{next(_serial)}"
        try:
            return _create(directory, version, limit_bytes)
        except CgroupError as error:
            reasons.append(str(error))
    hint = "run as root"
    if version == 2:
        hint += ", or inside `systemd-run --user --scope -p Delegate=yes`"
    raise CgroupError(f"memory cannot be capped here ({hint}): {'; '.join(reasons)}")


def _candidate_parents(root: Path) -> tuple[list[Path], int]:
    """Where a group may be made without leaving a limit in force, best first, and the version.

    Version 2 allows children with a memory limit only below a group that holds no processes itself,
    which is the normal case only for our group's ancestors; so those are tried, down to and
    including the innermost limited one. Outermost first: a group left over after a crash then never
    blocks the removal of the group we run in.
    """
    limited = {limit.path for limit in cgroup_limits(root)}
    chains: dict[int, list[Path]] = {}
    for directory, version in cgroup_directories(root, "memory"):
        chains.setdefault(version, []).append(directory)
    version = 1 if 1 in chains else 2
    chain = chains.get(version, [])
    innermost = next((index for index, directory in enumerate(chain) if directory in limited), None)
    if innermost is None:
        return chain[::-1], version
    # every place from our own group up to the limited one is still inside the limit
    return chain[innermost::-1], version


def _create(directory: Path, version: int, limit_bytes: int) -> MemoryCgroup:
    if version == 2:
        _enable_memory_controller(directory.parent)
    try:
        os.mkdir(directory)
    except OSError as error:
        raise CgroupError(f"{directory.parent} takes no new group ({error.strerror})") from None
    group = MemoryCgroup(directory, version, limit_bytes)
    limit, swap_limit = (_V1_LIMIT, _V1_SWAP_LIMIT) if version == 1 else (_V2_LIMIT, _V2_SWAP_LIMIT)
    try:
        _write(directory / limit, str(limit_bytes))
        # version 1 counts memory and swap together there, version 2 swap alone
        with contextlib.suppress(CgroupError):  # kernels without swap accounting have no such file
            _write(directory / swap_limit, str(limit_bytes if version == 1 else 0))
    except CgroupError:
        group.remove()
        raise
    return group


def _enable_memory_controller(parent: Path) -> None:
    control = parent / "cgroup.subtree_control"
    if "memory" in read_text(control).split():
        return
    if "memory" not in read_text(parent / "cgroup.controllers").split():
        raise CgroupError(f"{parent} has no memory controller")
    _write(control, "+memory")


def _write(path: Path, text: str) -> None:
    try:
        # not write_text: the file must exist already, and one write is one request to the kernel
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CgroupError(f"{path} does not take {text!r} ({error.strerror})") from None


def _pairs(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in read_text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
