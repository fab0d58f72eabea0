"""Progress on a terminal: one line that is rewritten in place and gone at the end; elsewhere a few lines."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, TextIO, TypeVar

from mobile_gguf.wording import format_duration

if TYPE_CHECKING:
    from mobile_gguf.vendor import Progress as BuildStep

# Without a terminal a line is written at each tenth, so that a log shows life and stays short.
_STEPS = 10

AnyLine = TypeVar("AnyLine", bound="StatusLine")


class StatusLine:
    """The line itself, on a stream; leave the block that it opens to wipe it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._width = 0
        self.is_terminal = stream.isatty()

    def show(self, text: str) -> None:
        """Rewrite the line; nothing without a terminal."""
        if self.is_terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)

    def keep(self, text: str) -> None:
        """Write a line that stays."""
        self.wipe()
        self._write(text + "\n")

    def wipe(self) -> None:
        """Clear the line; what comes next begins at its start."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
        self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __enter__(self: AnyLine) -> AnyLine:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.wipe()


class Progress(StatusLine):
    """A callback that shows a phase and its share done.

    Elsewhere a line for each phase, and for a phase with details (after a colon) one for each tenth of it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._written = ("", 0)

    def __call__(self, phase: str, done: float) -> None:
        done = min(max(done, 0.0), 1.0)
        self.show(f"{phase} {done:4.0%}")
        name, colon, _ = phase.partition(": ")
        step = (name, int(done * _STEPS) if colon else 0)
        # Reading a model is over soon, and what comes of it says enough.
        if not self.is_terminal and step != self._written and name != "loading":
            self.keep(phase)
        self._written = step


class TimedProgress(Progress):
    """Progress with the time left, where the phase does not say; a phase is the words before a colon."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._name = ""
        self._started = (0.0, 0.0)

    def __call__(self, phase: str, done: float) -> None:
        name, now = phase.split(":")[0], time.monotonic()
        if name != self._name:
            self._name, self._started = name, (now, done)
        elapsed, share = now - self._started[0], done - self._started[1]
        if share > 0 and elapsed > 1 and "ETA" not in phase:
            phase += f", ETA {format_duration(elapsed * (1 - done) / share)}"
        super().__call__(phase if self.is_terminal else name, done)


class BuildProgress(StatusLine):
    """Shows the steps of an engine's build, with the time since it began."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._started = time.monotonic()
        self._written = ""

    def update(self, step: BuildStep) -> None:
        """Show a step, or keep a note."""
        if step.is_note:
            self.keep(step.stage)
            return
        text = f"[{format_duration(time.monotonic() - self._started)}] {step.stage}"
        if step.total:
            text = f"{text} {step.done}/{step.total} {step.detail}".rstrip()
        self.show(text)
        tenth = "" if step.fraction is None else int(step.fraction * _STEPS)
        if not self.is_terminal and f"{step.stage} {tenth}" != self._written:
            self.keep(text)
        self._written = f"{step.stage} {tenth}"
