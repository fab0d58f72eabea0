"""Log probabilities of tokens in the forms of both endpoints."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from mobile_gguf.generate.answer.logprobs import TokenLogprob


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Each token with the likeliest at its place, as chat completions and responses have them."""

    def entry(piece: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}

    return [
        entry(token.piece, token.logprob) | {"top_logprobs": [entry(*item) for item in token.top]}
        for token in tokens
    ]


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a chat completion's choice."""
    return {"content": token_logprobs(tokens), "refusal": None}


class TextOffsets:
    """At which character of a text its tokens begin, one after another."""

    def __init__(self) -> None:
        self._n_characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, text_bytes: bytes) -> int:
        """Where the next token begins; a character in several tokens is where the first of them is."""
        offset = self._n_characters
        self._n_characters += len(self._decoder.decode(text_bytes))
        return offset


def completion_logprobs(tokens: Sequence[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
    """``logprobs`` of a text completion's choice, or of so much of it as comes next."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None
            if token.logprob is None
            else {piece.decode(errors="replace"): logprob for piece, logprob in token.top}
            for token in tokens
        ],
        "text_offset": [offsets.push(token.text_bytes) for token in tokens],
    }
