"""Drafts by a smaller model that is loaded beside the large one and speaks the same vocabulary.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mobile_gguf.errors import UsageError
from mobile_gguf.options.words import DRAFT

from ..context.decoder import Slice
from ..sessions.prefix_cache import common_length
from .source import Offer

if TYPE_CHECKING:
    from ..context.sampler import Sampler
    from ..llama import MobileLlama

_SHOWN = 24  # characters of a token in a message


class DraftModel:
    """The smaller model: ``name`` is what it was asked for by. It is this one's, and closed with it.

    Its context has the texts of as many sequences as the large one's, by the same numbers.
    """

    def __init__(self, name: str, llama: MobileLlama) -> None:
        self.name = name
        self._llama = llama
        self._texts: list[list[int]] = [[] for _ in range(llama.native.n_sequences)]

    @property
    def n_ctx(self) -> int:
        """Tokens that a text may have."""
        return self._llama.native.n_ctx

    def check(self, large: MobileLlama) -> None:
        """Raise UsageError where it is of no use for ``large``."""
        own, other = self._llama, large
        if not own.can_step_back:
            raise UsageError(
                f"{self.name} cannot draft: its memory cannot be rolled back behind a wrong guess"
            )
        if own.calls.n_vocab != other.calls.n_vocab:
            raise UsageError(
                f"{self.name} cannot draft: its vocabulary has {own.calls.n_vocab} tokens, and the model's "
                f"{other.calls.n_vocab}"
            )
        for token in range(own.calls.n_vocab):
            mine, its = own.calls.text(token), other.calls.text(token)
            if mine != its:
                raise UsageError(
                    f"{self.name} cannot draft: its vocabulary is another one, where token {token} is "
                    f"{mine[:_SHOWN]!r} and the model's {its[:_SHOWN]!r}"
                )

    def take_memory(self) -> None:
        """Use what it computes in once, so that it counts as taken."""
        n = min(self._llama.native.n_batch, self.n_ctx)
        self.bring(0, [0] * n)
        self._llama.decoder.clear(0)
        self._texts[0].clear()

    def bring(self, number: int, text: Sequence[int]) -> int:
        """Have the logits after ``text`` at hand; returns their output."""
        decoder, had = self._llama.decoder, self._texts[number]
        n = min(common_length(had, text), len(text) - 1)
        del had[n:]
        decoder.cut(n, number)
        row = -1
        with decoder.explained(long=len(text) - n > 1):
            while n < len(text):
                piece = list(text[n : n + decoder.native.n_batch])
                (row,) = decoder.run([Slice(number, n, piece)])
                had += piece
                n += len(piece)
        return row

    def draw(self, sampler: Sampler, row: int) -> int:
        """A token of output ``row``, which the sampler takes as said."""
        return self._llama.calls.sample(sampler.chain, row)

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends an answer."""
        return self._llama.is_end(token)

    def close(self) -> None:
        """Free it."""
        self._llama.close()


class ModelSource:
    """Guesses of a DraftModel on sequence ``number``, drawn by copies of the answer's ``sampler``."""

    name = DRAFT
    is_free = False

    def __init__(self, model: DraftModel, number: int, sampler: Sampler) -> None:
        self._model = model
        self._number = number
        self._sampler = sampler
        self._text: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        self._text += tokens

    def offer(self, most: int) -> Offer:
        return Offer(max(0, min(most, self._model.n_ctx - len(self._text))), self.name)

    def draft(self, n: int) -> list[int]:
        found: list[int] = []
        with self._sampler.copy() as guessing:
            while len(found) < n and not (found and self._model.is_end(found[-1])):
                row = self._model.bring(self._number, [*self._text, *found])
                found.append(self._model.draw(guessing, row))
        return found
