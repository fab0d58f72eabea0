"""The terminal is the screen's alone: whatever else writes to stdout or stderr goes to a log file.

llama-cpp-python points file descriptors 1 and 2 at /dev/null while it loads a model, and native libraries
print when they please. The first would freeze the screen, the second garble it. So the screen gets
duplicates of the descriptors, and the originals lead to a file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def own_terminal(log: Path) -> Iterator[None]:
    """Keep descriptors 1 and 2 away from the terminal that Textual draws on; ``log`` gets what they hear.

    A log that cannot be written is /dev/null.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    originals = sys.__stdout__, sys.__stderr__
    saved = os.dup(1), os.dup(2)
    screens = tuple(_stream(descriptor) for descriptor in saved)
    sink = _open_log(log)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        # Textual draws on sys.__stderr__ and asks sys.__stdout__ for the terminal's size.
        sys.__stdout__, sys.__stderr__ = screens  # type: ignore[misc]
        yield
    finally:
        for screen in screens:
            with contextlib.suppress(OSError, ValueError):
                screen.flush()
        sys.__stdout__, sys.__stderr__ = originals  # type: ignore[misc]
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
        os.close(sink)
        for screen in screens:
            with contextlib.suppress(OSError, ValueError):
                screen.close()


def stop_as_a_shell_does() -> bool:
    """Stop this process and the others of its group until they are continued, as a terminal's Ctrl-Z does.

    Returns False at once where nobody could continue them: without a shell that holds jobs the system leaves
    SIGTSTP without effect, which it would not do with SIGSTOP. Main thread only.
    """
    if not hasattr(signal, "SIGTSTP"):
        return False
    continued = False

    def hear(_number: int, _frame: object) -> None:
        nonlocal continued
        continued = True

    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL), signal.signal(signal.SIGCONT, hear)
    try:
        os.kill(0, signal.SIGTSTP)
        time.sleep(0)  # a handler runs between two steps of Python
    finally:
        signal.signal(signal.SIGTSTP, before[0])
        signal.signal(signal.SIGCONT, before[1])
    return continued


def _stream(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", errors="replace", closefd=True)


def _open_log(log: Path) -> int:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
