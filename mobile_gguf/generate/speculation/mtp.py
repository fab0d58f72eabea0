"""Drafts by the model's own block for multi-token prediction (MTP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mobile_gguf.options.words import MTP

from .source import NOTHING, Offer

if TYPE_CHECKING:
    from ..sampler import Sampler
    from .mtp_context import MtpContext


class MtpSource:
    """Guesses of the model's block for sequence ``number``, drawn by copies of the answer's ``sampler``."""

    name = MTP
    is_free = False

    def __init__(
        self, block: MtpContext, number: int, sampler: Sampler, is_end: Callable[[int], bool]
    ) -> None:
        self._block = block
        self._number = number
        self._sampler = sampler
        self._is_end = is_end
        self._text: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        self._text += tokens

    def offer(self, most: int) -> Offer:
        if not self._block.follows(self._number, self._text):
            return NOTHING
        return Offer(min(most, self._block.most or most), self.name)

    def draft(self, n: int) -> list[int]:
        with self._sampler.copy() as guessing:
            return self._block.draft(self._number, self._text, n, guessing, self._is_end)
