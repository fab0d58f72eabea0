"""Drafts from the text itself: what followed the last tokens when they came before.

Prompt look-up: no model is asked. The longest earlier match of the text's end is followed, of several the
latest; where a draft runs into the end of the text it goes on with itself, so that a period is continued.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

# A match has so many tokens at least, and is not looked at beyond so many.
LEAST_MATCH = 2
LONGEST_MATCH = 16
# Places that are looked at: of the same two tokens the latest.
_PLACES = 16
# Matches from so many tokens on are told apart: what follows a longer one is likelier right. How often the
# first token is, in code, prose and licences of all kinds (docs/speculation.md).
CLASSES = {2: 0.45, 4: 0.65, 8: 0.84}
_NONE = -1


class Lookup:
    """A text that grows by ``add``, and what its end is followed by elsewhere in it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("i")
        self._latest: dict[int, int] = {}  # of two tokens: where what follows them begins
        self._earlier = array("i")  # of a place: the one before it of the same two tokens, or none
        self.add(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """The text goes on by these."""
        text = self._tokens
        for token in tokens:
            # what follows the end itself is not known yet: its place is added with the next token
            earlier = _NONE
            if len(text) >= LEAST_MATCH:
                pair = _pair(text)
                earlier = self._latest.get(pair, _NONE)
                self._latest[pair] = len(text)
            self._earlier.append(earlier)
            text.append(token)

    def draft(self, most: int) -> tuple[list[int], int]:
        """At most ``most`` tokens that may come next, and how many tokens the match that says so has."""
        text = self._tokens
        if most <= 0 or len(text) <= LEAST_MATCH:
            return [], 0
        best, length = 0, 0
        place = self._latest.get(_pair(text), _NONE)
        for _ in range(_PLACES):
            if place == _NONE:
                break
            n = _match(text, place)
            if n > length:
                best, length = place, n
            place = self._earlier[place]
        if not length:
            return [], 0
        found: list[int] = []
        for i in range(best, best + most):
            found.append(text[i] if i < len(text) else found[i - len(text)])
        return found, length


def _pair(text: Sequence[int]) -> int:
    """The last two tokens as one number: of a long text the numbers are what takes memory."""
    return text[-2] << 32 | text[-1]


def _match(text: Sequence[int], place: int) -> int:
    """How many tokens before ``place`` are those before the end."""
    n = 0
    while n < min(place, LONGEST_MATCH) and text[place - 1 - n] == text[-1 - n]:
        n += 1
    return n


def class_of(match: int) -> str:
    """How far a match of so many tokens is trusted: matches of one class are taken to be right as often."""
    return name_of(max(least for least in CLASSES if least <= match))


def name_of(least: int) -> str:
    """The class of matches of so many tokens at least."""
    return f"{least}+"
