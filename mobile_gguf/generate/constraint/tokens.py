"""A model's vocabulary as the constraint library wants it: every token's bytes, and which are no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llguidance import LLTokenizer, TokenizerWrapper

# What the library takes for the mark of a token that is no text.
_NO_TEXT = b"\xff"


@dataclass(frozen=True)
class TokenTable:
    """Pieces of all tokens by id; ``special`` ones are no text, ``ends`` end an answer."""

    pieces: Sequence[bytes]
    special: frozenset[int]
    ends: frozenset[int]

    @property
    def never(self) -> int:
        """The id of a token that does not exist: where a grammar wants it, it wants what cannot come."""
        return len(self.pieces)

    def named(self, text: str) -> int | None:
        """The token that is exactly ``text``, one that is no text before others."""
        return self._by_piece.get(text.encode())

    def cover(self, text: bytes) -> list[int] | None:
        """Tokens of text that are ``text`` one after the other, long ones first; None if there are none."""
        tokens: list[int] = []
        at = 0
        while at < len(text):
            most = min(self._longest_text, len(text) - at)
            found = (self._of_text.get(text[at : at + n]) for n in range(most, 0, -1))
            token = next((one for one in found if one is not None), None)
            if token is None:
                return None
            tokens.append(token)
            at += len(self.pieces[token])
        return tokens

    @cached_property
    def _of_text(self) -> dict[bytes, int]:
        no_text = self.special | self.ends
        return {piece: token for token, piece in enumerate(self.pieces) if piece and token not in no_text}

    @cached_property
    def _longest_text(self) -> int:
        return max(map(len, self._of_text), default=0)

    @cached_property
    def _by_piece(self) -> dict[bytes, int]:
        ids = sorted(range(len(self.pieces)), key=lambda token: token in self.special)
        return {self.pieces[token]: token for token in ids}

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """The library's own form, a trie of all tokens: up to seconds, in which no thread of Python runs."""
        # the mark's byte is in no text: a token that has it would be taken for one that is none
        no_text = {
            i
            for i, piece in enumerate(self.pieces)
            if not piece or _NO_TEXT in piece or i in self.special or i in self.ends
        }
        tokens = [_NO_TEXT + piece if i in no_text else piece for i, piece in enumerate(self.pieces)]
        tokens.append(_NO_TEXT + b"<never>")
        ends = sorted(self.ends) or [self.never]
        special = sorted({*no_text, self.never})
        return LLTokenizer(TokenizerWrapper(_Tokens(tokens, ends[0], special)), eos_token=ends)


class _Tokens:
    """What the library asks a tokenizer for. It is never asked to tokenize: no token is forced."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos: int, special: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos
        self.special_token_ids = special

    def __call__(self, _text: bytes) -> list[int]:
        return []
