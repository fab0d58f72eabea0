"""Chat templates, rendered where they can do no harm: ``template_child.py`` in a process that is kept warm.

A template is a program that came with a model's file. It may loop, recurse and make texts as long as it
likes: its process is stopped by the kernel after ``CPU_SECONDS`` of computing or ``MEMORY_BYTES`` of memory,
and the next rendering has a new one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobile_gguf.engine.forks import abandon_in_children
from mobile_gguf.errors import EngineError, PromptTooLongError, UsageError
from mobile_gguf.processes import end, how_it_ended
from mobile_gguf.wording import why

from . import template_child

CPU_SECONDS = 5
FAILS = "the model's chat template fails: "
MEMORY_BYTES = 48 << 20
# Beside that, for each byte of what is rendered: templates copy their texts a few times.
_MEMORY_FACTOR = 16
# Only a machine that is hopelessly busy takes so long for CPU_SECONDS, where the kernel counts those.
_WALL_SECONDS = 20.0 if sys.platform == "win32" else 120.0
_START = """import sys, json, importlib.util
sys.path[:] = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("template_child", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.main()"""


class Renderer:
    """Renders templates one after another, for any thread; ``close`` ends its process.

    ``library`` is the path of an engine's that has llama.cpp's chat parser; without one there is no ``apply``
    and no ``parse``.
    """

    def __init__(self, library: str = "") -> None:
        self.library = library
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        abandon_in_children(self)

    def render(self, template: str, names: Mapping[str, Any], max_characters: int) -> str:
        """``template`` with ``names``, at most ``max_characters`` of text.

        Raises UsageError if the template refuses what it is given, fails or takes too much,
        PromptTooLongError if the text would be longer, EngineError if there can be no process.
        """
        return self._order("render", template, dict(names), max_characters)["text"]

    def apply(
        self, template: str, bos: str, eos: str, request: Mapping[str, Any], max_characters: int
    ) -> dict[str, Any]:
        """What mobile_chat_apply makes of a request by ``template``; raises as ``render``."""
        given = {"bos": bos, "eos": eos, "request": dict(request)}
        return self._order("apply", template, given, max_characters)

    def parse(self, parser: str, key: str, text: str, is_partial: bool) -> dict[str, Any]:
        """The message that ``text`` is by a parser that ``apply`` has made; raises UsageError, EngineError.

        ``key`` is the parser's own: as long as it is remembered by it, it is not sent again.
        """
        given = {"text": text, "is_partial": is_partial}
        made = self._order("parse", "", given, sys.maxsize, key)
        if template_child.UNKNOWN in made:
            made = self._order("parse", parser, given, sys.maxsize, key)
        return made

    def _order(
        self, kind: str, source: str, given: Any, max_characters: int, key: str = ""
    ) -> dict[str, Any]:
        try:
            encoded = json.dumps(given, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the messages cannot be given to a chat template: {error}") from None
        order = template_child.Order(
            kind=kind,
            source=source,
            key=key,
            library="" if kind == "render" else self.library,
            max_characters=max_characters,
            cpu_seconds=CPU_SECONDS,
            memory_bytes=MEMORY_BYTES + _MEMORY_FACTOR * (len(encoded) + len(source)),
        )
        with self._lock:
            answer = self._ask(json.dumps(order).encode(), encoded.encode())
        if template_child.TOO_LONG in answer:
            raise PromptTooLongError(
                "the messages make a longer prompt than the context holds: shorten them, or load the model "
                "with a larger --ctx-size"
            )
        if template_child.REFUSED in answer:
            reason = answer[template_child.REFUSED]
            raise UsageError(f"the model's chat template refuses these messages: {reason}")
        if template_child.FAILED in answer:
            raise UsageError(FAILS + answer[template_child.FAILED])
        return answer

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        with self._lock:
            self._end()

    def _abandon(self) -> None:
        """In a forked child: the process is the parent's, and the lock may be a thread's that is not here."""
        self._lock = threading.Lock()
        if self._finalizer is not None:
            self._finalizer.detach()
        self._child = self._finalizer = None

    def _ask(self, *lines: bytes) -> dict[str, Any]:
        child = self._running()
        assert child.stdin is not None
        try:
            for line in lines:
                child.stdin.write(line + b"\n")
            child.stdin.flush()
            answer = json.loads(_read_line(child))
            if template_child.ENDS in answer:
                self._end()
            return answer
        except _EndedError as ended:
            return {template_child.FAILED: str(ended)}
        except OSError:  # it ended before it had read all
            return {template_child.FAILED: "its process ended"}
        except BaseException:  # Ctrl-C: an answer may still be on its way, and is not the next order's
            self._end()
            raise
        finally:
            if child.poll() is not None:
                self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self._end()
        if self._child is None:
            path = json.dumps([entry for entry in sys.path if entry])
            command = [sys.executable, "-S", "-c", _START, path, str(Path(template_child.__file__))]
            try:
                # a session of its own: Ctrl-C at the terminal is for whoever asks
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise EngineError(f"no process can be started for the chat template: {why(error)}") from None
            self._finalizer = weakref.finalize(self, end, self._child)
        return self._child

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._child = self._finalizer = None


class _EndedError(Exception):
    """The process ended, or was ended, before it answered."""


def _read_line(child: subprocess.Popen[bytes]) -> bytes:
    assert child.stdout is not None
    until = time.monotonic() + _WALL_SECONDS
    watch = threading.Timer(_WALL_SECONDS, child.kill)
    watch.daemon = True
    watch.start()
    try:
        line = child.stdout.readline()
    finally:
        watch.cancel()
    if line.endswith(b"\n"):
        return line
    status = child.wait()
    raise _EndedError(
        f"it takes more than {_WALL_SECONDS:g} s" if time.monotonic() >= until else _how_it_ended(status)
    )


def _how_it_ended(status: int) -> str:
    if sys.platform != "win32" and status == -signal.SIGXCPU:
        return f"it takes more than {CPU_SECONDS} s of computing"
    return f"its process {how_it_ended(status)}"


def _plain(value: Any) -> Any:
    """What JSON has for a value that it does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "__index__"):
        return int(value)
    if hasattr(value, "tolist"):  # numpy's
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is neither text, a number, a list nor a dict")
