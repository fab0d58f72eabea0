"""The states of a text as one vector: llama.cpp's pooling where the file asks for one, otherwise ours.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llama_cpp import llama_cpp

from mobile_gguf.options.words import CLS, LAST, MEAN, RANK

from .decoder import Decoder, Slice
from .native import Native
from .sequence import TokenSequence

_NAMES = {
    llama_cpp.LLAMA_POOLING_TYPE_MEAN: MEAN,
    llama_cpp.LLAMA_POOLING_TYPE_CLS: CLS,
    llama_cpp.LLAMA_POOLING_TYPE_LAST: LAST,
    llama_cpp.LLAMA_POOLING_TYPE_RANK: RANK,
}
# llama.cpp computes logits with the states, and they take memory that no budget counts.
_LOGITS_BYTES = 32 << 20


def file_pooling(native: Native) -> str | None:
    """The pooling that the file asks for; None if it asks for none."""
    return _NAMES.get(int(llama_cpp.llama_pooling_type(native.ctx)))


def _in_parts(native: Native) -> bool:
    """Whether a text may be computed in parts: a token sees only those before it, no part is pooled."""
    architecture = native.says("general.architecture") or ""
    is_causal = native.says(f"{architecture}.attention.causal") != "false"
    return is_causal and bool(native.memory) and file_pooling(native) in (None, LAST)


def longest_text(native: Native) -> int:
    """Tokens of the longest text that can be embedded."""
    if _in_parts(native):
        return native.n_ctx
    n_at_once = min(native.n_batch, native.n_ubatch, native.n_ctx)
    # beyond what it was trained with, an encoder has no rows for positions
    return min(n_at_once, int(llama_cpp.llama_model_n_ctx_train(native.model)) or n_at_once)


def embed_tokens(sequence: TokenSequence, tokens: list[int], pooling: str) -> np.ndarray:
    """The pooled states of ``tokens``, float32 [n_embd]; the context is empty afterwards.

    A reranker's are its scores. Raises what decoding raises.
    """
    decoder = sequence.decoder
    sequence.put_away()
    _empty(sequence)
    try:
        sequence.scheduler.begin_alone(sequence, len(tokens))
        with decoder.explained(sequence.should_stop):
            return _pooled_state(decoder, sequence.number, tokens, pooling)
    finally:
        decoder.keep_states(False)
        _empty(sequence)


def _empty(sequence: TokenSequence) -> None:
    sequence.forget()
    sequence.decoder.clear(sequence.number)


def _pooled_state(decoder: Decoder, number: int, tokens: list[int], pooling: str) -> np.ndarray:
    native = decoder.native
    n_part = len(tokens)
    if _in_parts(native):
        n_part = min(native.n_batch, max(1, _LOGITS_BYTES // (4 * native.n_vocab)))
    parts = _Parts(int(llama_cpp.llama_model_n_embd_out(native.model)))
    by_file = file_pooling(native) is not None
    for start in range(0, len(tokens), n_part):
        part = tokens[start : start + n_part]
        decoder.run([Slice(number, start, part, every_output=True, keeps_state=True)])
        if not by_file:
            parts.add(_array(llama_cpp.llama_get_embeddings(native.ctx), (len(part), parts.n_embd)))
    if by_file:
        is_rank = file_pooling(native) == RANK
        n = int(llama_cpp.llama_model_n_cls_out(native.model)) if is_rank else parts.n_embd
        return _array(llama_cpp.llama_get_embeddings_seq(native.ctx, number), (n,)).copy()
    return parts.pooled(pooling)


def _array(pointer: Any, shape: tuple[int, ...]) -> np.ndarray:
    if not pointer:
        raise RuntimeError("the model has no states to make an embedding of")
    return np.ctypeslib.as_array(pointer, shape=shape)


class _Parts:
    """What is kept of the states of a text whose parts come one after another."""

    def __init__(self, n_embd: int) -> None:
        self.n_embd = n_embd
        self._n = 0
        self._sum = np.zeros(n_embd, dtype=np.float64)
        self._first = self._last = np.zeros(n_embd, dtype=np.float32)

    def add(self, states: np.ndarray) -> None:
        """Take the next states, [n, n_embd]."""
        if self._n == 0:
            self._first = states[0].copy()
        self._last = states[-1].copy()
        self._sum += states.sum(axis=0, dtype=np.float64)
        self._n += len(states)

    def pooled(self, pooling: str) -> np.ndarray:
        if pooling == MEAN:
            return (self._sum / self._n).astype(np.float32)
        return self._first if pooling == CLS else self._last
