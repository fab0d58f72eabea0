"""Processes under a hard memory limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mobile_gguf.memory.cap import CgroupError, MemoryCgroup, create_memory_cgroup


@contextmanager
def capped(limit: int) -> Iterator[MemoryCgroup]:
    try:
        group = create_memory_cgroup(limit)
    except CgroupError as error:
        pytest.skip(str(error))
    with group:
        yield group


def inside(group: MemoryCgroup) -> list[str]:
    """A command prefix: the shell moves itself into the group, then becomes the process under test."""
    return ["/bin/sh", "-c", f'echo $$ > "{group.directory}/cgroup.procs" && exec "$@"', "sh"]
