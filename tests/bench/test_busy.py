"""What a benchmark starts ends with it, however that ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

_PARENT = """
import time
from pathlib import Path
from mobile_gguf.bench import busy
with busy.busy_loops(1):
    print(Path("/proc/thread-self/children").read_text(), flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ticks(pid: int) -> int:
    """Processor time of a process that runs, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


@pytest.mark.parametrize("least", [0, 100], ids=["at once", "when it loops"])
def test_busy_loops_end_with_a_parent_that_is_killed(least: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as said:
        (loop,) = map(int, said.readline().split())
        assert is_running(loop)
        while ticks(loop) < least:
            time.sleep(0.05)
        parent.kill()
        parent.wait()
    until = time.monotonic() + 600
    while is_running(loop) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(loop)
