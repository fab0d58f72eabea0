"""Control tokens in what people, clients and tools wrote are text: they open no turn and end none.

A template writes a model's control tokens, such as ``<|im_end|>``, as text, and the whole prompt is made into
tokens in one go. So where somebody else's text holds one, its first character is given to the template as
a character that nobody else uses (``hide``). Whatever the template does with it (trims, upper-cases, quotes
it as JSON), no control token can come of it. When the prompt is made into tokens (``split``), the characters
are put back, in pieces that are read without control tokens. A prompt in which nothing had to be hidden is
read in one piece.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_SPACE = " \t\n\v\f\r"  # C's isspace
_PRIVATE = range(0xE000, 0xF900)
_OWN_WORDS = ("content", "reasoning_content", "thinking")


class Piece(NamedTuple):
    """A part of a prompt; ``is_plain`` if nothing in it is a control token."""

    text: str
    is_plain: bool


class Hidden(NamedTuple):
    """What stands for which character."""

    originals: Mapping[str, str]

    def show(self, text: str) -> str:
        """``text`` as it was written."""
        for stand_in, original in self.originals.items():
            text = text.replace(stand_in, original).replace(_escaped(stand_in), original)
        return text

    def is_in(self, text: str) -> bool:
        return any(one in text or _escaped(one) in text for one in self.originals)


class ControlTexts:
    """The texts of a vocabulary's control tokens.

    ``strips_after`` and ``strips_before`` are those beside which the tokenizer drops white space.
    """

    def __init__(
        self,
        texts: Iterable[str],
        strips_after: Iterable[str] = (),
        strips_before: Iterable[str] = (),
    ) -> None:
        self._texts = {text for text in texts if text}
        self._squeezed = {_squeeze(text) for text in self._texts} - {""}
        self._strips_after = set(strips_after)
        self._strips_before = set(strips_before)
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)
        self._squeezed_lengths = sorted({len(text) for text in self._squeezed})
        self._window = 4 * max(self._lengths, default=0) + 64
        firsts = {text[0] for text in self._texts}
        firsts |= {one for text in self._squeezed for one in (text[0], text[0].upper()) if len(one) == 1}
        self._firsts = re.compile("[" + "".join(map(re.escape, sorted(firsts))) + "]") if firsts else None

    def hide(self, messages: Any, values: Any, template: str) -> tuple[Any, Any, Hidden | None]:
        """Messages and values of JSON with control texts in their strings hidden, and what stands for what.

        A control text is found in any case, and with white space in it, which templates change. What
        ``template`` itself looks for in an assistant's turn, such as the end of its thoughts, stays there.
        """
        kept = {text for text in self._texts if _is_looked_for(text, template)}
        places: dict[tuple[str, bool], list[int]] = {}

        def note(text: str, is_own: bool) -> str:
            if (text, is_own) not in places:
                places[text, is_own] = self._places(text, kept if is_own else set())
            return text

        for value in (messages, values):
            _changed(value, note)
        found = {at: where for at, where in places.items() if where}
        if not found:
            return messages, values, None
        firsts = sorted({text[place] for (text, _), where in found.items() for place in where})
        taken = "\n".join([*(text for text, _ in places), template])
        free = (one for one in map(chr, _PRIVATE) if one not in taken and _escaped(one) not in taken)
        stand_ins = dict(zip(firsts, free, strict=False))

        def hidden(text: str, is_own: bool) -> str:
            if (text, is_own) not in found:
                return text
            characters = list(text)
            for place in found[text, is_own]:
                characters[place] = stand_ins[characters[place]]
            return "".join(characters)

        originals = {stand_in: first for first, stand_in in stand_ins.items()}
        return _changed(messages, hidden), _changed(values, hidden), Hidden(originals)

    def _places(self, text: str, kept: set[str]) -> list[int]:
        """Where something begins that is a control text, or could become one."""
        if self._firsts is None:
            return []
        return [
            match.start()
            for match in self._firsts.finditer(text)
            if self._begins(_squeeze(text[match.start() : match.start() + self._window]))
            and self._at(text, match.start()) not in kept
        ]

    def _begins(self, squeezed: str) -> bool:
        return any(squeezed[:length] in self._squeezed for length in self._squeezed_lengths)

    def _at(self, text: str, begin: int) -> str:
        """The control text that begins there, as it is written; empty if none does."""
        return next((one for n in self._lengths if (one := text[begin : begin + n]) in self._texts), "")

    def split(self, prompt: str, hidden: Hidden | None) -> list[Piece]:
        """The pieces to make tokens of, one after another; only the first may have a token put before it."""
        if hidden is None or not hidden.is_in(prompt):
            return [Piece(prompt, False)]
        pieces: list[Piece] = []
        start = end = 0  # of what is read as the template wrote it
        before = ""
        for begin, text in [*self._written(prompt), (len(prompt), "")]:
            fragment = prompt[end:begin]
            if hidden.is_in(fragment):
                if start < end:
                    pieces.append(Piece(prompt[start:end], False))
                start = begin
                shown = hidden.show(fragment)
                if before in self._strips_after:
                    shown = shown.lstrip(_SPACE)
                if text in self._strips_before:
                    shown = shown.rstrip(_SPACE)
                pieces.append(Piece(shown, True))
            end, before = begin + len(text), text
        if start < end:
            pieces.append(Piece(prompt[start:end], False))
        return pieces

    def apart(self, text: str) -> list[str]:
        """A plain text cut behind the first character of each control text in it."""
        cuts = [0, *(begin + 1 for begin, _ in self._written(text)), len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]

    def _written(self, prompt: str) -> Iterator[tuple[int, str]]:
        """The control texts of a prompt, with where each begins."""
        position = 0
        assert self._firsts is not None
        while match := self._firsts.search(prompt, position):
            begin = match.start()
            text = self._at(prompt, begin)
            if text:
                yield begin, text
            position = begin + (len(text) or 1)


def _squeeze(text: str) -> str:
    return "".join(text.split()).lower()


def _escaped(character: str) -> str:
    """The character as JSON has it in ASCII."""
    return f"\\u{ord(character):04x}"


def _is_looked_for(text: str, template: str) -> bool:
    """Whether a template does something about ``text`` in what it is given."""
    if text not in template:
        return False
    quoted = "|".join(re.escape(mark + text + mark) for mark in "'\"")
    methods = "split|rsplit|partition|startswith|endswith|find"
    return re.search(rf"(?:{quoted})\s+in\b|\.(?:{methods})\(\s*(?:{quoted})", template) is not None


def _changed(value: Any, change: Callable[[str, bool], str], is_own: bool = False) -> Any:
    """A value of JSON with each string changed; told if it is what an assistant itself has said."""
    if isinstance(value, str):
        return change(value, is_own)
    if isinstance(value, Mapping):
        is_assistant = value.get("role") == "assistant"
        return {
            _changed(key, change): _changed(item, change, is_own or (is_assistant and key in _OWN_WORDS))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_changed(item, change, is_own) for item in value]
    return value


def text_length(value: Any) -> int:
    """Characters in all strings of a value of JSON."""
    total = 0

    def count(text: str, _is_own: bool) -> str:
        nonlocal total
        total += len(text)
        return text

    _changed(value, count)
    return total
