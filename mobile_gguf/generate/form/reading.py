"""An answer read as it is made: what its text adds to its thoughts, to its calls and to what is said."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mobile_gguf.errors import EngineError, UsageError

from .form import Form

logger = logging.getLogger("mobile_gguf")

# A long answer is read again when it has grown by this share: all of it is read each time.
_GROWN = 256
_ID_LENGTH = 9  # what Mistral's templates take, and others take anything


@dataclass(frozen=True)
class CallDelta:
    """A piece of a tool call: the first has ``id`` and ``name``, the others more of the arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What is new in an answer: text for its reader, thoughts, pieces of calls."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True)
class Call:
    """A tool call; ``arguments`` is JSON as text."""

    id: str
    name: str
    arguments: str


Parse = Callable[[str, str, str, bool], dict[str, Any]]


class AnswerReader:
    """Reads one answer of a Form; ``parse`` is Renderer's. What cannot be parsed is text as it is."""

    def __init__(self, form: Form, parse: Parse) -> None:
        self._form = form
        self._parse = parse
        self._text = ""
        self._n_read = 0
        self._said = self._thought = ""
        self._calls: list[list[str]] = []  # id, name, arguments, as far as they were told
        self._is_plain = False

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls so far."""
        return tuple(Call(*call) for call in self._calls)

    def push(self, text: str) -> Delta:
        """Take more of the answer's text."""
        self._text += text
        if self._is_plain:
            return Delta(text)
        if len(self._text) - self._n_read <= len(self._text) // _GROWN:
            return Delta()
        return self._read(is_partial=True) or Delta()

    def finish(self, is_whole: bool) -> Delta:
        """What is left once the answer has ended; it ``is_whole`` if nobody cut it."""
        if self._is_plain:
            return Delta()
        made = self._read(is_partial=not is_whole)
        if made is None and is_whole:  # not as it ought to be: as far as it goes
            made = self._read(is_partial=True)
            if made is not None:
                made = replace(made, calls=made.calls + self._closed())
        if made is not None and (self._said or self._thought or self._calls):
            return made
        return self._plain()

    def _read(self, is_partial: bool) -> Delta | None:
        self._n_read = len(self._text)
        try:
            message = self._parse(self._form.parser, self._form.key, self._text, is_partial)
        except (UsageError, EngineError) as error:
            if is_partial:
                logger.debug("an answer is not in the model's form: %s", error)
            return None
        reasoning, self._thought = _grown(self._thought, message["reasoning_content"])
        text, self._said = _grown(self._said, message["content"])
        return Delta(text, reasoning, tuple(self._call_deltas(message["tool_calls"])))

    def _call_deltas(self, calls: list[dict[str, str]]) -> list[CallDelta]:
        made = []
        for index, call in enumerate(calls):
            if not call["name"]:
                break
            if index == len(self._calls):
                self._calls.append([call["id"] or secrets.token_hex(5)[:_ID_LENGTH], call["name"], ""])
                made.append(CallDelta(index, *self._calls[index][:2]))
            arguments, self._calls[index][2] = _grown(self._calls[index][2], call["arguments"])
            if arguments:
                made.append(CallDelta(index, arguments=arguments))
        return made

    def _closed(self) -> tuple[CallDelta, ...]:
        """The end of arguments that lack nothing else: blanks that a grammar allows may not be to be read."""
        made = []
        for index, call in enumerate(self._calls):
            if not _is_json(call[2]) and _is_json(call[2] + "}"):
                call[2] += "}"
                made.append(CallDelta(index, arguments="}"))
        return tuple(made)

    def _plain(self) -> Delta:
        """All text as it is, when nothing of it could be read."""
        self._is_plain = True
        return Delta(self._text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _grown(before: str, now: str) -> tuple[str, str]:
    """What ``now`` has behind ``before``, and what has been told then; what was told cannot be taken back."""
    if now.startswith(before):
        return now[len(before) :], now
    return "", before
