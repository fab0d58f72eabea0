"""From key to screen in the chat while the demo model generates: ``python -m mobile_gguf.bench.tui_latency``.

Runs the real program on a pseudo-terminal, types a letter, and waits until the terminal has been sent it.
Prints milliseconds: median, 95th percentile and largest, idle and while generating.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import statistics
import struct
import sys
import tempfile
import termios
import time

_KEYS = 60
_LETTERS = "qzxjkv"


def main() -> int:
    """Run the measurement."""
    child, terminal = pty.fork()
    if child == 0:
        # a directory of its own for conversations and settings, the user's models
        os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="tui-latency-")
        os.environ["TERM"] = "xterm-256color"
        arguments = [sys.executable, "-m", "mobile_gguf", "chat", "demo", "--ram-budget", "40%"]
        os.execv(sys.executable, arguments)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 36, 120, 0, 0))
    try:
        _wait(terminal, b"exact", 120)
        idle = _measure(terminal)
        os.write(terminal, b"\x03" + b"Tell a very long story about a lighthouse.\r")
        _wait(terminal, b"tok/s", 60)
        busy = _measure(terminal)
    finally:
        os.write(terminal, b"\x11")
        _drain(terminal, 3.0)
        os.close(terminal)
        os.waitpid(child, 0)
    for name, values in (("idle", idle), ("generating", busy)):
        worst = sorted(values)
        print(
            f"{name}: median {statistics.median(worst):.0f} ms, 95% {worst[int(0.95 * len(worst))]:.0f} ms, "
            f"largest {worst[-1]:.0f} ms ({len(worst)} keys)"
        )
    return 0


def _measure(terminal: int) -> list[float]:
    """Milliseconds from each key to the letter's arrival; letters that answers hardly use."""
    times = []
    for i in range(_KEYS):
        _drain(terminal, 0.02)
        letter = _LETTERS[i % len(_LETTERS)].upper().encode()
        started = time.perf_counter()
        os.write(terminal, letter)
        _wait(terminal, letter, 10)
        times.append((time.perf_counter() - started) * 1e3)
        os.write(terminal, b"\x7f")
        _drain(terminal, 0.08)
    return times


def _wait(terminal: int, text: bytes, seconds: float) -> None:
    seen, deadline = b"", time.monotonic() + seconds
    while text not in seen:
        if time.monotonic() > deadline:
            raise SystemExit(f"{text!r} never came to the terminal")
        if select.select([terminal], [], [], 0.1)[0]:
            seen = (seen + os.read(terminal, 65536))[-65536 * 2 :]


def _drain(terminal: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                os.read(terminal, 65536)
            except OSError:
                return


if __name__ == "__main__":
    sys.exit(main())
