"""Calls of OpenAI's custom tools, which take a text: the model calls a function with one argument of text.

The text is read out of the call's JSON as it comes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mobile_gguf.generate.form.reading import CallDelta

from .request_parts import CUSTOM_ARGUMENT

_BEGIN = re.compile(r'\s*\{\s*"' + CUSTOM_ARGUMENT + r'"\s*:\s*"')
_PIECE = re.compile(r'[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u]')
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True)
class CustomDelta(CallDelta):
    """A piece of a call of a custom tool; ``arguments`` is more of its text."""


class CustomCalls:
    """Turns the calls of one answer that are of the custom tools ``names`` into theirs."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._texts: dict[int, ArgumentText] = {}

    def told(self, call: CallDelta) -> CallDelta | None:
        """The same piece of a call as its client is told it; None if it says nothing yet."""
        if call.id is not None and call.name in self._names:
            self._texts[call.index] = ArgumentText()
        if call.index not in self._texts:
            return call
        text = self._texts[call.index].push(call.arguments)
        return CustomDelta(call.index, call.id, call.name, text) if text or call.id is not None else None

    def rest(self) -> Iterator[CallDelta]:
        """What is left when the answer ends."""
        for index, text in self._texts.items():
            if left := text.rest():
                yield CustomDelta(index, arguments=left)


class ArgumentText:
    """The text that is the one argument of a call, out of pieces of the call's JSON."""

    def __init__(self) -> None:
        self._unread = ""
        self._begun = self._ended = False
        self._half = ""  # the first of a surrogate pair

    def push(self, json: str) -> str:
        """Take more of the JSON; returns more of the text."""
        self._unread += json
        if not self._begun:
            match = _BEGIN.match(self._unread)
            if match is None:
                return ""
            self._begun, self._unread = True, self._unread[match.end() :]
        return "" if self._ended else self._read()

    def rest(self) -> str:
        """What never was such an argument, as it is; half a character is one that cannot be read."""
        if not self._begun:
            return self._unread
        return "\ufffd" if self._half else ""

    def _read(self) -> str:
        found, at = [], 0
        while match := _PIECE.match(self._unread, at):
            at = match.end()
            found.append(self._character(match[0]))
        self._ended = self._unread.startswith('"', at)
        self._unread = self._unread[at:]
        return "".join(found)

    def _character(self, piece: str) -> str:
        made = piece
        if piece.startswith("\\u"):
            made = chr(int(piece[2:], 16))
        elif piece.startswith("\\"):
            made = _ESCAPES.get(piece[1], piece[1])
        half, self._half = self._half, ""
        if half:
            if "\udc00" <= made[0] <= "\udfff":
                return (half + made[0]).encode("utf-16", "surrogatepass").decode("utf-16") + made[1:]
            return "\ufffd" + self._character_of(made)
        return self._character_of(made)

    def _character_of(self, made: str) -> str:
        if "\ud800" <= made[0] <= "\udbff":
            self._half = made
            return ""
        return "\ufffd" if "\udc00" <= made[0] <= "\udfff" else made
