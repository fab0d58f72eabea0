"""What a text's last tokens left behind for the model's MTP block, and how much of the text the block has.

A token at place p goes through the block with the state of the model at p - 1. Pure: arrays and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..sessions.prefix_cache import common_length

# States of so many tokens are kept where they are not asked for, and so many once the block has had them: as
# far as a text may go back.
MOST, LEAST = 128, 32

_States = npt.NDArray[np.float32]


class TextStates:
    """Of one sequence: the states of ``tokens`` from place ``first`` on, of width ``n_embd``; and ``had``,
    the tokens that the block has keys of, from place ``begin`` on."""

    def __init__(self, n_embd: int) -> None:
        self.first = self.begin = 0
        self.tokens: list[int] = []
        self.had: list[int] = []
        self._states = np.empty((0, n_embd), np.float32)

    @property
    def end(self) -> int:
        """The place behind the last token whose state is here."""
        return self.first + len(self.tokens)

    def took(self, start: int, tokens: Sequence[int], states: _States) -> None:
        """The model ran ``tokens`` from place ``start`` on, and what was there before is gone."""
        n = start - self.first
        if not 0 <= n <= len(self.tokens):  # those between were not seen
            self.first, n = start, 0
        self.tokens[n:] = tokens
        self._states = np.concatenate([self._states[:n], states])
        self._turned(start, tokens)

    def skipped(self, start: int) -> None:
        """The model ran tokens from place ``start`` on whose states nobody has."""
        n = max(0, start - self.first)
        del self.tokens[n:]
        self._states = self._states[:n]
        self._turned(start)

    def _turned(self, start: int, tokens: Sequence[int] = ()) -> None:
        """The text goes on by ``tokens`` from place ``start`` on: what the block has of another is gone."""
        place = max(0, start - self.begin)
        known = self.had[place:] if start >= self.begin else []
        del self.had[place + common_length(known, tokens) :]

    def follows(self, text: Sequence[int]) -> bool:
        """Whether the state before ``text``'s last token is here, once what is of another text is gone.

        The block has not had that token then, or no longer: what comes after it is to be said.
        """
        before = text[:-1]
        n = _common(self.tokens, before[self.first :])
        del self.tokens[n:]
        self._states = self._states[:n]
        del self.had[_common(self.had, before[self.begin :]) :]
        return bool(before) and n > 0 and self.end == len(before)

    def due(self) -> int:
        """The place from which on the block is to run what has states; it begins anew behind a gap."""
        place = self.begin + len(self.had)
        if self.had and self.first < place:
            return place
        self.had.clear()
        self.begin = self.first + 1 if self.first else 0
        return self.begin

    def rows(self, place: int, end: int) -> _States:
        """What goes with the tokens at places from ``place`` to ``end``: a text's first one has no state."""
        before = self._states[max(0, place - 1 - self.first) : end - 1 - self.first]
        return before if place else np.concatenate([np.zeros_like(self._states[:1]), before])

    def shorten(self, most: int) -> None:
        """Keep the last ``LEAST`` states if there are more than ``most``, which is no less."""
        n = len(self.tokens) - LEAST
        if len(self.tokens) > most:
            del self.tokens[:n]
            self._states = self._states[n:].copy()
            self.first += n


def _common(some: list[int], others: Sequence[int]) -> int:
    n = len(some)
    return n if some == others[:n] else common_length(some, others)
