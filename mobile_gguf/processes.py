"""How a child process is ended, and what is said of one that ended by itself."""

from __future__ import annotations

import contextlib
import signal
import subprocess


def end(child: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill a child that still runs, wait for it, and close its pipes."""
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def how_it_ended(status: int) -> str:
    """What became of a child with this exit status, below 0 for a signal: a clause without a subject."""
    if status == -getattr(signal, "SIGKILL", 9):
        return "was killed, most likely because the memory ran out"
    if status < 0:
        return f"crashed (signal {-status})"
    return f"failed (exit status {status})"
