"""Log probabilities of the tokens that were chosen, in the forms of both endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobile_gguf.api.model import Model

# What JSON has for a probability of zero; OpenAI's own number.
_LEAST = -9999.0


@dataclass(frozen=True)
class TokenLogprob:
    """A token's bytes and log probability, and those of the likeliest tokens at its place."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()

    @property
    def text(self) -> str:
        return self.piece.decode(errors="replace")


def read_logprob(model: Model, token: int, n_top: int) -> TokenLogprob:
    """Log probability of ``token`` by the pass it was just sampled from, before temperature and grammar."""
    import numpy as np

    logits = np.asarray(model.last_logits(), dtype=np.float64)
    highest = logits.max()
    logprobs = logits - highest - np.log(np.exp(logits - highest).sum())
    n = min(n_top, len(logprobs))
    best = np.argpartition(-logprobs, n - 1)[:n] if n else np.empty(0, dtype=np.int64)
    best = best[np.argsort(-logprobs[best], kind="stable")]
    top = tuple((model.piece(int(i), special=True), _finite(logprobs[i])) for i in best)
    return TokenLogprob(model.piece(token, special=True), _finite(logprobs[token]), top)


def _finite(value: Any) -> float:
    return max(_LEAST, float(value)) if value == value else _LEAST


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a chat completion's choice."""

    def entry(piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}

    content = [
        entry(token.piece, token.logprob) | {"top_logprobs": [entry(*item) for item in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """``logprobs`` of a text completion's choice whose first token begins at character ``offset``."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {piece.decode(errors="replace"): logprob for piece, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }
