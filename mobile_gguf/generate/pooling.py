"""A Llama's states as one vector: llama.cpp's pooling where the file asks for one, otherwise ours.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llama_cpp import Llama, llama_cpp

from mobile_gguf.options.words import CLS, LAST, MEAN, RANK

_NAMES = {
    llama_cpp.LLAMA_POOLING_TYPE_MEAN: MEAN,
    llama_cpp.LLAMA_POOLING_TYPE_CLS: CLS,
    llama_cpp.LLAMA_POOLING_TYPE_LAST: LAST,
    llama_cpp.LLAMA_POOLING_TYPE_RANK: RANK,
}
# llama.cpp computes logits with the states, and they take memory that no budget counts.
_LOGITS_BYTES = 32 << 20


def file_pooling(llama: Llama) -> str | None:
    """The pooling that the file asks for; None if it asks for none."""
    return _NAMES.get(int(llama_cpp.llama_pooling_type(llama.ctx)))


def has_memory(llama: Llama) -> bool:
    """Whether the model keeps what it has read, without which it can continue nothing (an encoder)."""
    return bool(llama_cpp.llama_get_memory(llama.ctx))


def clear_memory(llama: Llama) -> None:
    """Forget all positions; nothing for a model without a memory."""
    memory = llama_cpp.llama_get_memory(llama.ctx)
    if memory:
        llama_cpp.llama_memory_clear(memory, False)


def _in_parts(llama: Llama) -> bool:
    """Whether a text may be computed in parts: a token sees only those before it, no part is pooled."""
    architecture = llama.metadata.get("general.architecture", "")
    is_causal = llama.metadata.get(f"{architecture}.attention.causal", "true") != "false"
    return is_causal and has_memory(llama) and file_pooling(llama) in (None, LAST)


def longest_text(llama: Llama) -> int:
    """Tokens of the longest text that can be embedded."""
    if _in_parts(llama):
        return llama.n_ctx()
    n_at_once = min(llama.n_batch, int(llama_cpp.llama_n_ubatch(llama.ctx)), llama.n_ctx())
    # beyond what it was trained with, an encoder has no rows for positions
    return min(n_at_once, int(llama_cpp.llama_model_n_ctx_train(llama.model)) or n_at_once)


def pooled_state(llama: Llama, tokens: list[int], pooling: str) -> np.ndarray:
    """The pooled states of ``tokens``, float32 [n_embd], by a context that is empty and keeps states.

    Raises RuntimeError if llama.cpp fails.
    """
    n_part = len(tokens)
    if _in_parts(llama):
        n_part = min(llama.n_batch, max(1, _LOGITS_BYTES // (4 * llama.n_vocab())))
    parts = _Parts(int(llama_cpp.llama_model_n_embd_out(llama.model)))
    by_file = file_pooling(llama) is not None
    for start in range(0, len(tokens), n_part):
        part = tokens[start : start + n_part]
        llama._batch.set_batch(part, start, True)
        llama._ctx.decode(llama._batch)
        if not by_file:
            parts.add(_array(llama_cpp.llama_get_embeddings(llama.ctx), (len(part), parts.n_embd)))
    if by_file:
        return _array(llama_cpp.llama_get_embeddings_seq(llama.ctx, 0), (parts.n_embd,)).copy()
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
