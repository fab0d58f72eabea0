"""What others take of the processors, as Linux tells it; elsewhere nothing is known."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from .cgroup import read_text

_NS = 1e-9


@dataclass(frozen=True)
class Processors:
    """``waited_s``: how long this thread could have run and had no processor; ``at``: when.

    ``idle_s``: processor seconds that nobody used; ``others_s``: those that other processes used, or the
    host of a virtual machine. Sums since some start: differences count.
    """

    waited_s: float
    idle_s: float
    others_s: float
    at: float


class Competition:
    """Readings of one thread after the other: whoever calls ``read`` is the thread that waits."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0

    def read(self) -> Processors | None:
        """Sums until now; None where the system does not say (not Linux, no scheduler statistics)."""
        thread = threading.get_native_id()
        # run time, time on a run queue, slices: 0 0 0 where the kernel keeps none
        words = read_text(self._root / f"proc/{os.getpid()}/task/{thread}/schedstat").split()
        if len(words) != 3 or words[2] == "0" or not self._ticks:
            return None
        spent = read_text(self._root / "proc/stat").partition("\n")[0].split()
        # cpu, user, nice, system, idle, iowait, irq, softirq, steal; guests count as user
        if len(spent) < 9 or spent[0] != "cpu":
            return None
        ticks = [int(word) for word in spent[1:9]]
        idle = ticks[3] + ticks[4]  # one that waits for a disk is free
        return Processors(
            waited_s=int(words[1]) * _NS,
            idle_s=idle / self._ticks,
            others_s=(sum(ticks) - idle) / self._ticks - time.process_time(),
            at=time.perf_counter(),
        )
