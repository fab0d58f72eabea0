"""Background jobs: the command line's own verbs as child processes, their progress read from stderr."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from textual.message import Message

from mobile_gguf.wording import why

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
_SHARE = re.compile(r"(\d{1,3})%\s*$")
_PARTS = re.compile(rb"(?:[\r\n]|\x1b\[K)+")  # what ends a line, or wipes it
_KEPT_LINES = 200
_ERROR_PREFIX = "mobile-gguf: error: "  # of the command line; here the job's state says it
_ASK_SECONDS, _INSIST_SECONDS = 10.0, 3.0


@dataclass
class Job:
    """One job; ``share`` is 0 to 1 where the job says, ``lines`` the last of what it wrote."""

    id: int
    argv: list[str]
    state: str = RUNNING
    phase: str = "starting"
    share: float | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    cancelled: bool = False

    @property
    def title(self) -> str:
        return " ".join(self.argv)

    def hear(self, line: str) -> None:
        """Take in a line of the job's stderr or stdout."""
        line = line.strip()
        if not line:
            return
        found = _SHARE.search(line)
        if found and int(found[1]) <= 100:
            self.share = int(found[1]) / 100
            self.phase = line[: found.start()].strip() or self.phase
        else:
            self.phase = line
            self.lines.append(line)

    def end(self, code: int) -> None:
        """Take in the exit code."""
        self.state = CANCELLED if self.cancelled else DONE if code == 0 else FAILED
        self.phase = self.lines[-1].removeprefix(_ERROR_PREFIX) if self.lines else f"exit code {code}"
        if self.state == DONE:
            self.share = 1.0


@dataclass
class JobHeard(Message):
    """A job wrote a line."""

    job_id: int
    line: str


@dataclass
class JobEnded(Message):
    """A job's process is gone."""

    job_id: int
    code: int


class Jobs:
    """All jobs since the program began. ``post`` gets messages from the threads that read the children."""

    def __init__(self, post: Callable[[Message], object], program: Sequence[str] | None = None) -> None:
        self._post = post
        self._program = list(program or (sys.executable, "-m", "mobile_gguf"))
        self._numbers = itertools.count(1)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self.jobs: dict[int, Job] = {}

    @property
    def running(self) -> list[Job]:
        """The jobs that are not over."""
        return [job for job in self.jobs.values() if job.state == RUNNING]

    def start(self, argv: Sequence[str]) -> Job:
        """Start ``mobile-gguf ARGV`` and return its job; one that cannot be started has failed already."""
        job = Job(next(self._numbers), list(argv))
        self.jobs[job.id] = job
        # A terminal makes the command show its progress as it goes; nobody else reads this one.
        reader, writer = _terminal()
        environment = {
            **os.environ,
            "TERM": "xterm",  # on a dumb one progress is a line here and there
            "NO_COLOR": "1",
            "COLUMNS": "160",
            "PYTHONUNBUFFERED": "1",
        }
        try:
            child = subprocess.Popen(
                [*self._program, *argv],
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            os.close(reader)
            job.hear(f"cannot be started: {why(error)}")
            job.end(-1)
            return job
        finally:
            os.close(writer)
        self._children[job.id] = child
        threading.Thread(target=self._read, args=(job.id, child, reader), daemon=True).start()
        return job

    def _read(self, job_id: int, child: subprocess.Popen[bytes], reader: int) -> None:
        rest = b""
        while True:
            try:
                data = os.read(reader, 65536)
            except OSError:  # what the end of a terminal looks like
                data = b""
            if not data:
                break
            *parts, rest = _PARTS.split(rest + data)
            for part in parts[-50:] if len(parts) > 200 else parts:
                self._tell(JobHeard(job_id, part.decode("utf-8", errors="replace")))
        if rest.strip():
            self._tell(JobHeard(job_id, rest.decode("utf-8", errors="replace")))
        os.close(reader)
        self._tell(JobEnded(job_id, child.wait()))

    def _tell(self, message: Message) -> None:
        with contextlib.suppress(RuntimeError):  # the screen is gone
            self._post(message)

    def hear(self, event: JobHeard) -> Job:
        """Take in a message of a reader."""
        job = self.jobs[event.job_id]
        job.hear(event.line)
        return job

    def ended(self, event: JobEnded) -> Job:
        """Take in the end of a job."""
        job = self.jobs[event.job_id]
        job.end(event.code)
        self._children.pop(event.job_id, None)
        return job

    def cancel(self, job_id: int) -> None:
        """Ask a job to end, as Ctrl-C does; one that will not is made to."""
        child = self._children.get(job_id)
        if child is None or child.poll() is not None:
            return
        self.jobs[job_id].cancelled = True
        threading.Thread(target=_end, args=(child, _ASK_SECONDS), daemon=True).start()

    def close(self) -> None:
        """End all jobs, and wait for that."""
        children = list(self._children.values())
        enders = [threading.Thread(target=_end, args=(child, _INSIST_SECONDS)) for child in children]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()


def _terminal() -> tuple[int, int]:
    try:
        return os.openpty()
    except (AttributeError, OSError):
        return os.pipe()


def _end(child: subprocess.Popen[bytes], patience: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(child.pid, number)
            else:  # Windows, which knows one way to end a process
                child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            return
