"""Running a tool: output to a log file and line by line to a callback, and no orphans on Ctrl-C."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TAIL_LINES = 4000  # kept for the explanation of a failure; the log has them all


def run(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> tuple[int, list[str]]:
    """Run a command and return its exit status and the last lines of its output.

    stdout and stderr are merged, appended to ``log`` and given to ``on_line`` without the line end.
    Interrupted, the command and all that it started are ended before the exception goes on.
    """
    lines: list[str] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"$ {subprocess.list2cmdline(list(command))}\n")
        sink.flush()
        # a session of its own: a Ctrl-C at the terminal reaches us alone, and we end the whole group
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            assert child.stdout is not None  # PIPE, above
            for raw in child.stdout:
                sink.write(raw)
                line = raw.rstrip("\r\n")
                lines.append(line)
                del lines[:-TAIL_LINES]
                on_line(line)
            return child.wait(), lines
        except BaseException:
            _end_group(child)
            raise


def _end_group(child: subprocess.Popen[str]) -> None:
    for name in ("SIGTERM", "SIGKILL"):
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(child.pid, getattr(signal, name))
            else:
                child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)
            return


def capture(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Output of a short command, stdout and stderr merged; "" if it cannot be run or fails."""
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=env, cwd=cwd, encoding="utf-8", errors="replace", timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
