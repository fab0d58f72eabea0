"""How a child process is ended, and what is said of one that ended by itself."""

from __future__ import annotations

import contextlib
import os
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


_WINDOWS_ABORT, _WINDOWS_EXCEPTIONS = 3, 0xC0000000  # of the C runtime's abort(); NTSTATUS of errors


def crashed(status: int) -> bool:
    """Whether a child with this exit status was ended by a signal, or what Windows has in its place."""
    return status < 0 or (os.name == "nt" and (status == _WINDOWS_ABORT or status >= _WINDOWS_EXCEPTIONS))


def how_it_ended(status: int) -> str:
    """What became of a child with this exit status, below 0 for a signal: a clause without a subject."""
    if status == -getattr(signal, "SIGKILL", 9):
        return "was killed, most likely because the memory ran out"
    if crashed(status):
        return f"crashed (signal {-status})" if status < 0 else f"crashed (exit status {status:#x})"
    return f"failed (exit status {status})"
