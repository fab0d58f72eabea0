"""Progress on a terminal: one line that is rewritten in place and gone at the end; elsewhere a few lines.

A dumb terminal cannot rewrite a line: there it is as elsewhere, with a line for each tenth of a load as well.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from typing import TYPE_CHECKING, TextIO, TypeVar

from mobile_gguf.wording import clipped, format_duration, plain

if TYPE_CHECKING:
    from mobile_gguf.vendor import Progress as BuildStep

# Without a terminal a line is written at each tenth, so that a log shows life and stays short.
_STEPS = 10

_ERASE = "\r\033[K"  # the whole line, with what the terminal itself wrote into it, such as ^C

AnyLine = TypeVar("AnyLine", bound="StatusLine")


def is_dumb() -> bool:
    """Whether the terminal, if there is one, does only what a typewriter can."""
    return os.environ.get("TERM") == "dumb"


def erase(stream: TextIO) -> None:
    """Clear the line that the cursor is in, where the stream is a terminal that can."""
    if stream.isatty() and not is_dumb():
        stream.write(_ERASE)


class StatusLine:
    """The line itself, on a stream; leave the block that it opens to wipe it.

    Inside the block a terminal is written to by a descriptor of its own: llama-cpp-python leads the process's
    to /dev/null while it loads a model.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._own: TextIO | None = None
        self._shown = ""
        self.is_terminal = stream.isatty() and not is_dumb()
        self.is_watched = stream.isatty()  # by a person, also where a line cannot be rewritten

    def show(self, text: str) -> None:
        """Rewrite the line; nothing without a terminal."""
        text = clipped(plain(text), shutil.get_terminal_size().columns - 1)
        if self.is_terminal and text != self._shown:
            self._write(_ERASE + text)
            self._shown = text

    def keep(self, text: str) -> None:
        """Write a line that stays."""
        self.wipe()
        self._write(text + "\n")

    def wipe(self) -> None:
        """Clear the line; what comes next begins at its start."""
        if self._shown:
            self._write(_ERASE)
        self._shown = ""

    def _write(self, text: str) -> None:
        stream = self._own or self._stream
        stream.write(text)
        stream.flush()

    def __enter__(self: AnyLine) -> AnyLine:
        if self.is_watched:
            # what has no descriptor is not led elsewhere either
            with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
                self._stream.flush()
                self._own = open(os.dup(self._stream.fileno()), "w", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *_exception: object) -> None:
        self.wipe()
        if self._own is not None:
            self._own.close()
            self._own = None


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
        step = (name, int(done * _STEPS) if colon or self.is_watched else 0)
        if not self.is_terminal and step != self._written:
            if self.is_watched:
                self.keep(f"{phase} {done:.0%}")
            # Reading a model is over soon, and what comes of it says enough to a log.
            elif name != "loading":
                self.keep(phase)
        self._written = step


class PromptProgress(StatusLine):
    """Shows how many tokens of a prompt are computed, on a terminal only: ``on_prompt`` of an answer."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._told = -1

    def __call__(self, done: int, total: int) -> None:
        text = f"reading the prompt: {done} of {total} tokens"
        self.show(text)
        tenth = _STEPS * done // max(1, total)
        # a short prompt is not worth a line that stays
        if self.is_watched and not self.is_terminal and tenth != self._told and done < total:
            self.keep(text)
        self._told = tenth


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
