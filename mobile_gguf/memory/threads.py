"""How many threads to use when nobody says."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .cgroup import cgroup_directories, read_number, read_text


def default_threads(root: Path = Path("/")) -> tuple[int, int]:
    """(for generation, for prompts): the cores, and all the processors, this process may run on.

    Generation waits for memory, so a core's second hardware thread only adds barriers to it. A
    cgroup's CPU quota bounds both: threads beyond it spin while they are not allowed to run.
    """
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        processors = os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None:
        processors = max(1, min(processors, math.ceil(quota)))
    smt = read_text(root / "sys/devices/system/cpu/smt/active").strip() == "1"
    return max(1, processors // 2 if smt else processors), processors


def bounded_threads(asked: int | None, processors: int) -> tuple[int | None, str]:
    """As many threads as were asked for and there are processors, and a notice if these were fewer.

    A thread without a processor makes all others wait for it at every step.
    """
    if asked is None or asked <= processors:
        return asked, ""
    return processors, f"{asked} threads are more than this process has processors: {processors} are used"


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota of the cgroups this process is in, in processors; None if there is none."""
    quotas = []
    for directory, version in cgroup_directories(root, "cpu"):
        if version == 2:
            words = read_text(directory / "cpu.max").split()
            quota, period = [int(word) if word.isdigit() else None for word in (*words, "", "")[:2]]
        else:
            quota = read_number(directory / "cpu.cfs_quota_us")  # -1, not a number here: no quota
            period = read_number(directory / "cpu.cfs_period_us")
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)
