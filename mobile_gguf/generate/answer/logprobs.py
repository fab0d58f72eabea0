"""Log probabilities of tokens, by the pass before them: of a prompt's, and of an answer's as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mobile_gguf.errors import EngineError

# What stands for a probability of zero, as JSON has no infinity; OpenAI's own number.
_LEAST = -9999.0


class Pieces(Protocol):
    """What knows the bytes of tokens, as a Model does."""

    def piece(self, token: int, *, special: bool = ...) -> bytes: ...


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log probability (natural), and those of the likeliest tokens at its place.

    ``logprob`` is None for the first token of a prompt, which nothing foretells. ``piece`` are the token's
    bytes, a control token's name among them; ``text_bytes`` those that the text has of it. ``top`` are bytes
    and log probabilities, the likeliest first.
    """

    token: int
    piece: bytes
    text_bytes: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()

    @property
    def text(self) -> str:
        return self.piece.decode(errors="replace")


def token_logprob(pieces: Pieces, token: int, logits: Any, n_top: int) -> TokenLogprob:
    """Log probability of ``token`` by ``logits`` [n_vocab], before temperature and grammar.

    Raises EngineError for logits that are no numbers.
    """
    import numpy as np

    logits = np.asarray(logits, dtype=np.float64)
    highest = logits.max()
    if not np.isfinite(highest):
        raise EngineError("the model computes no numbers (NaN or infinity): its weights are damaged")
    logprobs = logits - highest - np.log(np.exp(logits - highest).sum())
    n = min(n_top, len(logprobs))
    best = np.argpartition(-logprobs, n - 1)[:n] if n else np.empty(0, dtype=np.int64)
    best = best[np.argsort(-logprobs[best], kind="stable")]
    top = tuple((pieces.piece(int(i), special=True), max(_LEAST, float(logprobs[i]))) for i in best)
    return _entry(pieces, token, max(_LEAST, float(logprobs[token])), top)


class PromptLogprobs:
    """Gathers those of a prompt while it is computed: an answer's ``on_logits``."""

    def __init__(self, pieces: Pieces, prompt: Sequence[int], n_top: int) -> None:
        self._pieces = pieces
        self._prompt = prompt
        self._n_top = n_top
        self.tokens = [_entry(pieces, prompt[0], None, ())]

    def __call__(self, place: int, logits: Any) -> None:
        """Take the logits after the prompt's token ``place``."""
        if place + 1 < len(self._prompt):
            following = self._prompt[place + 1]
            self.tokens.append(token_logprob(self._pieces, following, logits, self._n_top))


def _entry(
    pieces: Pieces, token: int, logprob: float | None, top: tuple[tuple[bytes, float], ...]
) -> TokenLogprob:
    return TokenLogprob(token, pieces.piece(token, special=True), pieces.piece(token), logprob, top)
