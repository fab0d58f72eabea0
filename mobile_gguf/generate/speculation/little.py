"""Drafts by the model itself: passes of few experts, whose rows are overwritten when the draft is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mobile_gguf.options.words import LITTLE

from .source import Offer

if TYPE_CHECKING:
    from ..context.sampler import Sampler
    from ..context.sequence import TokenSequence


class LittleSource:
    """Guesses of passes with ``little_k`` experts a token; ``sample`` draws one by a chain of an output.

    ``sampler`` is the answer's: guesses are drawn by copies of it.
    """

    name = LITTLE
    is_free = False

    def __init__(
        self,
        sequence: TokenSequence,
        little_k: int,
        sampler: Sampler,
        sample: Callable[[Sampler, int], int],
        is_end: Callable[[int], bool],
    ) -> None:
        self._sequence = sequence
        self._little_k = little_k
        self._sampler = sampler
        self._sample = sample
        self._is_end = is_end
        self._last = 0  # what the text ends with, which was not run yet

    def add(self, tokens: Sequence[int]) -> None:
        self._last = tokens[-1]

    def offer(self, most: int) -> Offer:
        return Offer(most, self.name)

    def draft(self, n: int) -> list[int]:
        sequence, token = self._sequence, self._last
        start, found = len(sequence.tokens), []
        try:
            with self._sampler.copy() as guessing:
                while len(found) < n and not (found and self._is_end(token)):
                    sequence.run_guess(token, self._little_k)
                    token = self._sample(guessing, sequence.row)
                    found.append(token)
        finally:
            sequence.drop_guesses(start)
        return found
