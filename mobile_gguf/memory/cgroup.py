"""The control groups this process is in, versions 1 and 2, nested or seen from inside a container.

Paths are taken below an injectable root, so tests use fixture trees.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cgroup_directories(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The directories, innermost first, of the groups this process is in, with their version."""
    mounts = _mounts(root, controller)
    for line in read_text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            version = 2
        elif controller in controllers.split(","):
            version = 1
        else:
            continue
        for mount_root, mount_point, mount_version in mounts:
            if mount_version != version:
                continue
            top = root / mount_point.lstrip("/")
            # In a container the mount may show only a part of the host's tree, or the group's path
            # may be the host's: then what is mounted is the container's own group.
            inside = os.path.relpath(group, mount_root) if mount_root != "/" else group.lstrip("/")
            directory = top if inside.startswith("..") else top / inside
            if not directory.is_dir():
                directory = top
            yield from ((parent, version) for parent in _up_to(directory, top))
            break


def _up_to(directory: Path, top: Path) -> Iterator[Path]:
    directory, top = Path(os.path.normpath(directory)), Path(os.path.normpath(top))
    while True:
        yield directory
        if directory == top or top not in directory.parents:
            return
        directory = directory.parent


def _mounts(root: Path, controller: str) -> list[tuple[str, str, int]]:
    """(root within the hierarchy, mount point, version) of the mounts that have the controller."""
    mounts = []
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or not kind:
            continue
        if kind[0] == "cgroup2":
            mounts.append((fields[3], fields[4], 2))
        elif kind[0] == "cgroup" and controller in kind[-1].split(","):
            mounts.append((fields[3], fields[4], 1))
    return mounts


def read_stat(directory: Path) -> dict[str, int]:
    """The name-value lines of a group's ``memory.stat``."""
    pairs = (line.split() for line in read_text(directory / "memory.stat").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def read_number(path: Path) -> int | None:
    """The number in a file; None if there is no such file or it says ``max``."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def read_text(path: Path) -> str:
    """A file's text, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
