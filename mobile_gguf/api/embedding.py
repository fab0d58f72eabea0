"""Embeddings: a text as one vector of length 1, by the pooling that a model was made with or is asked for.

And what a reranker makes of two texts, a score.

A file that says how its states are pooled (``ARCH.pooling_type``) is pooled by llama.cpp. The states of any
other model, the last layer's after its norm, are pooled here: their mean, the first, or the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mobile_gguf.errors import PromptTooLongError, UsageError, require_unicode
from mobile_gguf.generate.answer.answer import read_traffic
from mobile_gguf.generate.answer.receipt import Receipt
from mobile_gguf.generate.backend import Backend
from mobile_gguf.generate.request.request import token_ids
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.bias import check_tokens
from mobile_gguf.options.words import POOLINGS, RANK


@dataclass(frozen=True)
class Embedding:
    """A text's vector, float32 [n_embd] of length 1, how many tokens it was made of, and what it cost."""

    vector: Any
    n_tokens: int
    receipt: Receipt


def choose_pooling(own: str | None, asked: str | None, name: str) -> str:
    """How the model ``name`` is pooled: as its file says, else as asked. Raises UsageError."""
    if own == RANK:
        raise UsageError(f"{name} is a reranker: it scores pairs of texts and makes no embeddings")
    if asked is not None and asked not in POOLINGS:
        raise UsageError(f"pooling is {asked!r}: choose {', '.join(POOLINGS)}")
    if own is not None and asked not in (None, own):
        raise UsageError(f"{name} was made for pooling {own}: it cannot be {asked}")
    pooling = own or asked
    if pooling is None:
        raise UsageError(
            f"{name} does not say how its states make an embedding: give a pooling, such as mean"
        )
    return pooling


def embed(
    backend: Backend,
    info: GgufInfo,
    text: str | Sequence[int],
    pooling: str | None,
    should_stop: Callable[[], bool] | None,
) -> Embedding:
    """The vector of a text, or of token ids as they are. Raises UsageError, EngineError."""
    import numpy as np

    name = info.path.name
    pooling = choose_pooling(backend.pooling, pooling, name)
    limit = backend.embedding_limit
    if isinstance(text, str):
        encoded = require_unicode("the text", text).encode()
        backend.check_fits(encoded, limit)
        tokens = backend.tokenize(encoded, add_bos=True, special=False)
    else:
        tokens = token_ids(text)
        check_tokens(tokens, info.n_vocab, "the text")
    if not tokens:
        raise UsageError("there is nothing to embed: the text is empty")
    vector, receipt = _computed(backend, info, tokens, pooling, "the text", should_stop)
    length = float(np.linalg.norm(vector))
    return Embedding(vector / np.float32(length) if length > 0 else vector, len(tokens), receipt)


@dataclass(frozen=True)
class Score:
    """How well a document answers a query, the more the better, how many tokens both had, and the cost."""

    score: float
    n_tokens: int
    receipt: Receipt


def rank(
    backend: Backend, info: GgufInfo, query: str, document: str, should_stop: Callable[[], bool] | None
) -> Score:
    """A reranker's score of a pair. Raises UsageError, EngineError."""
    name, limit = info.path.name, backend.embedding_limit
    if backend.pooling != RANK:
        raise UsageError(f"{name} is no reranker: it scores no pairs of texts")
    for what, text in (("the query", query), ("the document", document)):
        backend.check_fits(require_unicode(what, text).encode(), limit)
    tokens = backend.pair_tokens(query, document)
    scores, receipt = _computed(backend, info, tokens, RANK, "a query and its document", should_stop)
    return Score(float(scores[0]), len(tokens), receipt)


def _computed(
    backend: Backend,
    info: GgufInfo,
    tokens: list[int],
    pooling: str,
    what: str,
    should_stop: Callable[[], bool] | None,
) -> tuple[Any, Receipt]:
    """What the model makes of all tokens, float32, and what it cost."""
    import numpy as np

    limit = backend.embedding_limit
    if len(tokens) > limit:
        raise PromptTooLongError(
            f"{what} has {len(tokens)} tokens and {info.path.name} embeds at most {limit} at once: shorten "
            "it, or load the model with larger --ctx-size, --batch-size and --ubatch-size, as trained for"
        )
    with backend.seated(tokens, False) as sequence:
        sequence.should_stop = should_stop
        made = np.asarray(backend.embed_tokens(tokens, pooling), dtype=np.float32)
        spent = sequence.traffic()
    traffic = read_traffic(backend, spent.host, spent.device, spent.ahead)
    store = backend.store
    budget = store.budget_bytes if store is not None else 0
    return made, Receipt(n_expert_used=info.n_expert_used, budget_bytes=budget, **traffic)
