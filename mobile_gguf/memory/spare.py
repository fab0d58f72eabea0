"""What of the free memory nobody has been promised: for what is kept as long as there is room."""

from __future__ import annotations

from pathlib import Path

from .cgroup import read_text
from .machine import read_memory


class SpareMemory:
    """Asked for bytes beside a plan of ``planned_bytes`` for all else; made before that is loaded.

    What was planned and is not taken yet (slots that fill, buffers that a longer prompt writes to) is left
    alone, and half of what else is free; the process never has more than ``total_bytes``, if some are
    promised. Paths are taken below ``root``, so that it can be tested.
    """

    def __init__(self, planned_bytes: int, total_bytes: int = 0, root: Path = Path("/")) -> None:
        self._planned_bytes = planned_bytes
        self._total_bytes = total_bytes
        self._root = root
        self._before = resident_bytes(root)

    def bytes_beside(self, kept_bytes: int) -> int:
        """Bytes that may be taken beside ``kept_bytes``, which the plan does not have."""
        resident = resident_bytes(self._root)
        taken = max(0, resident - self._before - kept_bytes)
        to_come = max(0, self._planned_bytes - taken)
        available = read_memory(self._root).available_bytes
        if self._total_bytes:
            available = min(available, self._total_bytes - resident)
        return max(0, available - to_come) // 2


def resident_bytes(root: Path) -> int:
    """This process's memory; 0 where the system does not say."""
    for line in read_text(root / "proc/self/status").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name == "VmRSS" and words and words[0].isdigit():
            return int(words[0]) * 1024
    return 0
