"""What a source of drafts is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mobile_gguf.options.words import NGRAM

from .lookup import CLASSES, LONGEST_MATCH, Lookup, class_of, name_of


@dataclass(frozen=True)
class Offer:
    """So many tokens that a source would draft now; drafts of one ``kind`` are taken to be right as often."""

    n: int
    kind: str


NOTHING = Offer(0, "")
# How often the first token of a draft is right, by kind, before it was seen.
USUALLY_RIGHT = {f"{NGRAM} {name_of(least)}": right for least, right in CLASSES.items()}


class Source(Protocol):
    """Guesses how an answer goes on; one for each answer.

    ``is_free``: its guesses cost nothing, so that they are compared with the answer where they are not run.
    """

    name: str
    is_free: bool

    def add(self, tokens: Sequence[int]) -> None:
        """The text goes on by these: the prompt first, then what the answer says, token by token."""
        ...

    def offer(self, most: int) -> Offer:
        """What ``draft`` would give of at most so many tokens."""
        ...

    def draft(self, n: int) -> list[int]:
        """At most ``n`` tokens that may follow the text."""
        ...


class LookupSource:
    """Drafts from the prompt and the answer themselves, and from a ``prediction`` of the answer."""

    name = NGRAM
    is_free = True

    def __init__(self, prediction: Sequence[int] = ()) -> None:
        self._lookup = Lookup()
        self._prediction = prediction
        self._found: list[int] = []  # what was offered last, of the text as it is

    def add(self, tokens: Sequence[int]) -> None:
        self._found = []
        if self._prediction:
            # what the prompt ends with leads to it
            self._lookup.add([*tokens[-LONGEST_MATCH:], *self._prediction])
            self._prediction = ()
        self._lookup.add(tokens)

    def offer(self, most: int) -> Offer:
        self._found, match = self._lookup.draft(most)
        return Offer(len(self._found), f"{self.name} {class_of(match)}") if self._found else NOTHING

    def draft(self, n: int) -> list[int]:
        return self._found[:n] if n <= len(self._found) else self._lookup.draft(n)[0]
