"""An answer as blocks, one after another: what the model thought, what it said, and its calls.

Responses and Messages both have an answer in this form, streamed and whole. White space around what is said
is nobody's words where a thought or a call stands beside it: it is kept back until words follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from mobile_gguf.generate.answer.logprobs import TokenLogprob

from .custom import CustomDelta
from .produce import Event

THOUGHT, WORDS, CALL = "thought", "words", "call"
Kind = Literal["thought", "words", "call"]


@dataclass
class Block:
    """A block so far; a call's ``text`` is its arguments, JSON, or what a custom tool is given.

    Words have ``logprobs``, if asked for.
    """

    index: int
    kind: Kind
    text: str = ""
    id: str = ""  # of a call
    name: str = ""
    is_custom: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What happened to a block: it ``begins``, it has ``more`` of so many tokens, or it ``ends``."""

    what: Literal["begins", "more", "ends"]
    block: Block
    more: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class Blocks:
    """Follows the events of one answer; ``finish_reason`` is why it ended, once it has."""

    def __init__(self) -> None:
        self.done: list[Block] = []
        self.finish_reason: str | None = None
        self._open: Block | None = None
        self._held = ""  # white space that may turn out to be nobody's
        self._tokens: list[TokenLogprob] = []  # of what is held, and of what is not told yet

    def push(self, event: Event) -> Iterator[Step]:
        """The steps that an event makes."""
        if event.choice < 0:
            return
        self._tokens += event.logprobs
        if event.reasoning:
            yield from self._say(THOUGHT, event.reasoning)
        if event.text:
            yield from self._say(WORDS, event.text)
        call = event.call
        if call is not None:
            if call.id is not None:
                yield from self._close()
                yield from self._begin(CALL, call.id, call.name or "", isinstance(call, CustomDelta))
            if call.arguments:
                yield from self._more(call.arguments)
        self.finish_reason = event.finish_reason or self.finish_reason

    def end(self) -> Iterator[Step]:
        """Nothing more comes."""
        if self._open is not None and self._held:
            yield from self._more(self._held)
        yield from self._close()

    def whole(self, events: Iterable[Event]) -> list[Block]:
        """The blocks of all events, which is the same as what a stream of them says."""
        for event in events:
            for _ in self.push(event):
                pass
        for _ in self.end():
            pass
        return self.done

    def _close(self) -> Iterator[Step]:
        self._held = ""
        if self._open is not None:
            block, self._open = self._open, None
            self.done.append(block)
            yield Step("ends", block)

    def _say(self, kind: Kind, text: str) -> Iterator[Step]:
        if self._open is not None and self._open.kind == kind:
            text = self._held + text
        else:
            is_first = self._open is None and not self.done
            text = self._held + text if is_first else text.lstrip()
            if not text.strip():
                self._held = text if is_first else self._held
                return
            yield from self._close()
            yield from self._begin(kind)
        said = text.rstrip()
        self._held = text[len(said) :]
        if said:
            yield from self._more(said)

    def _begin(self, kind: Kind, id: str = "", name: str = "", is_custom: bool = False) -> Iterator[Step]:
        self._open = Block(len(self.done), kind, id=id, name=name, is_custom=is_custom)
        yield Step("begins", self._open)

    def _more(self, text: str) -> Iterator[Step]:
        assert self._open is not None
        tokens = self._told(text) if self._open.kind == WORDS else ()
        self._tokens.clear()
        self._open.text += text
        self._open.logprobs += tokens
        yield Step("more", self._open, text, tokens)

    def _told(self, text: str) -> tuple[TokenLogprob, ...]:
        """Those tokens that ``text`` ends with; what came before them in a form is no part of the words."""
        n_bytes, first = len(text.encode(errors="replace")), len(self._tokens)
        while n_bytes > 0 and first > 0:
            first -= 1
            n_bytes -= len(self._tokens[first].text_bytes)
        return tuple(one for one in self._tokens[first:] if one.text_bytes)
