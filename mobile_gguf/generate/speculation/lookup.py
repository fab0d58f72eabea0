"""Drafts from the text itself: what followed the last tokens when they came before.

Prompt look-up: no model is asked. The longest earlier match of the text's end is followed, of several the
latest; where a draft runs into the end of the text it goes on with itself, so that a period is continued.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# A match has so many tokens at least, and is not looked at beyond so many.
LEAST_MATCH = 2
LONGEST_MATCH = 16
# Places that are looked at: of the same two tokens the latest.
_PLACES = 16
# Matches from so many tokens on are told apart: what follows a longer one is likelier right.
_CLASSES = (2, 4, 8)


class Lookup:
    """A text that grows by ``add``, and what its end is followed by elsewhere in it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # of two tokens: where what follows them begins
        self.add(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """The text goes on by these."""
        text = self._tokens
        for token in tokens:
            # what follows the end itself is not known yet: its place is added with the next token
            if len(text) >= LEAST_MATCH:
                self._places.setdefault((text[-2], text[-1]), []).append(len(text))
            text.append(token)

    def draft(self, most: int) -> tuple[list[int], int]:
        """At most ``most`` tokens that may come next, and how many tokens the match that says so has."""
        text = self._tokens
        if most <= 0 or len(text) <= LEAST_MATCH:
            return [], 0
        best, length = 0, 0
        for place in reversed(self._places.get((text[-2], text[-1]), ())[-_PLACES:]):
            n = _match(text, place)
            if n > length:
                best, length = place, n
        if not length:
            return [], 0
        found: list[int] = []
        for i in range(best, best + most):
            found.append(text[i] if i < len(text) else found[i - len(text)])
        return found, length


def _match(text: Sequence[int], place: int) -> int:
    """How many tokens before ``place`` are those before the end."""
    n = 0
    while n < min(place, LONGEST_MATCH) and text[place - 1 - n] == text[-1 - n]:
        n += 1
    return n


def class_of(match: int) -> str:
    """How far a match of so many tokens is trusted: matches of one class are taken to be right as often."""
    return f"{max(least for least in _CLASSES if least <= match)}+"
