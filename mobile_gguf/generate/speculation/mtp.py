"""Drafts by the model's own block for multi-token prediction (MTP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mobile_gguf.options.words import MTP

from .mtp_context import Wanted
from .source import NOTHING, Offer

if TYPE_CHECKING:
    from ..context.sampler import Sampler
    from .mtp_context import MtpContext


class MtpSource:
    """Guesses of the model's block for sequence ``number``, drawn by copies of the answer's ``sampler``.

    ``draft`` is the block's, for what all answers that are made at once want of it.
    """

    name = MTP
    is_free = False

    def __init__(
        self,
        block: MtpContext,
        number: int,
        sampler: Sampler,
        is_end: Callable[[int], bool],
        draft: Callable[[Wanted], list[int]],
    ) -> None:
        self._block = block
        self._draft = draft
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
            return self._draft(Wanted(self._number, self._text, n, guessing, self._is_end))
