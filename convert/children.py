"""Running a step of the conversion in a process of its own: progress as JSON lines, no orphans.

A process of its own keeps the memory of one step from the next, the pinned converter's modules from ours,
and makes a computation that holds no Python lock end at once on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.processes import end, how_it_ended

OnEvent = Callable[[dict[str, Any]], bool]


class ChildError(MobileError):
    """A step's process said what went wrong, or died; ``errno`` is the system's number if it was one."""

    def __init__(self, text: str, errno: int | None = None) -> None:
        super().__init__(text)
        self.errno = errno


class ChildDiedError(ChildError):
    """A step's process ended on its own, without a word for us; ``last_line`` is the last that it wrote."""

    def __init__(self, text: str, last_line: str) -> None:
        super().__init__(f"{text}: {last_line}" if last_line else text)
        self.last_line = last_line


def run_child(
    module: str, job: Mapping[str, Any], *, what: str, environment: Mapping[str, str], on_event: OnEvent
) -> None:
    """Run ``python -m module`` on ``job`` until it ends.

    on_event is called with each object that the child sends; the child goes on after ``wait_for_go`` when
    it returns true. ``what`` names the step in errors. Interrupted, or when on_event raises, it is ended.
    Raises ChildError with the child's own words, ChildDiedError with the last line it wrote when it died.
    """
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as log:
        # a session of its own: a Ctrl-C at the terminal reaches us alone, and we end the child
        child = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env=dict(environment), encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        error: ChildError | None = None
        try:
            _send(child, json.dumps(dict(job)))
            for line in child.stdout or ():
                event = _parse(line)
                if "error" in event:
                    error = ChildError(str(event["error"]), event.get("errno"))
                elif on_event(event):
                    _send(child, "go")
            status = child.wait()
        finally:
            end(child)
        if error is not None:
            raise error
        if status != 0:
            log.seek(0)
            raise ChildDiedError(f"{what} {how_it_ended(status)}", _last_line(log.readlines()))


def _parse(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _send(child: subprocess.Popen[str], line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # it died: its exit status says more
        if child.stdin is not None:
            child.stdin.write(line + "\n")
            child.stdin.flush()


def _last_line(lines: list[str]) -> str:
    texts = [line.strip() for line in lines if line.strip()]
    return texts[-1] if texts else ""


def child_environment(*first_on_path: str) -> dict[str, str]:
    """Our environment with ``first_on_path`` leading PYTHONPATH."""
    path = [*first_on_path, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
