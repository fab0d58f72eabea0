"""Sequences run side by side, one token each at a step, every one with its own number of experts.

A step of many sequences reads an expert once for all of them, so measuring twenty settings costs far less
than twenty runs. What a sequence computes depends on its own rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.log import clear_errors, last_errors
from mobile_gguf.errors import EngineError

if TYPE_CHECKING:  # it needs the engine, and what is measured here can be computed with without one
    from mobile_gguf.generate.llama import MobileLlama

Floats = npt.NDArray[np.float32]


class Lockstep:
    """A context of ``n_seq`` sequences of ``n_ctx`` tokens beside that of ``llama``; free it with ``close``.

    ``twice``: ``run_twice`` will be asked for. ``ctx`` is the context's address. Raises EngineError if there
    is no memory for it.
    """

    def __init__(
        self, llama: MobileLlama, *, n_seq: int, n_ctx: int, threads: int, twice: bool = False
    ) -> None:
        from llama_cpp import llama_cpp

        if llama.engine is None:
            raise EngineError("per-token experts need a model in the engine's store")
        self._api: Any = llama_cpp
        self.engine = llama.engine
        self._n_vocab, self._n_embd = llama.calls.n_vocab, llama_cpp.llama_model_n_embd(llama.model)
        self._n_out = llama_cpp.llama_model_n_embd_out(llama.model)  # more with hyper-connections, filled up
        self._n_seq, self._can_step_back = n_seq, llama.can_step_back
        n_kept = sequences_kept(n_seq, twice and not self._can_step_back)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_kept * n_ctx, n_kept
        params.n_batch = params.n_ubatch = n_kept  # llama.cpp keeps room for an output of every sequence
        params.n_threads = params.n_threads_batch = threads
        params.embeddings, params.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_NONE
        clear_errors()
        ctx = llama_cpp.llama_init_from_model(llama.model, params)
        if not ctx:
            raise EngineError(f"no context for {n_seq} sequences of {n_ctx} tokens: {last_errors()}")
        self.ctx: int = ctx
        self._memory = llama_cpp.llama_get_memory(ctx)
        self._batch = llama_cpp.llama_batch_init(n_seq, 0, 1)

    def clear(self) -> None:
        """Empty every sequence."""
        self._api.llama_memory_clear(self._memory, True)

    def run(
        self, tokens: Sequence[int], sequences: Sequence[int], position: int, experts: Sequence[int]
    ) -> tuple[Floats, Floats]:
        """Run a token at ``position`` of each of ``sequences``, with ``experts`` (0: top-k) of it.

        Returns logits [n, n_vocab] and last hidden states [n, n_embd]. Raises EngineError.
        """
        batch, n = self._batch, len(tokens)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i] = int(tokens[i]), position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, int(sequences[i]), 1
        self.engine.set_batch_n_expert_used(self.ctx, [int(k) for k in experts])
        clear_errors()
        code = self._api.llama_decode(self.ctx, batch)
        if code != 0:
            reason = self.engine.context_error(self.ctx) or last_errors()
            raise EngineError(f"decoding failed: {reason or f'llama.cpp says {code}'}")
        return self._rows(self._api.llama_get_logits, n, self._n_vocab), self._rows(
            self._api.llama_get_embeddings, n, self._n_out
        )[:, : self._n_embd]

    def run_twice(
        self,
        tokens: Sequence[int],
        sequences: Sequence[int],
        position: int,
        first: Sequence[int],
        second: Sequence[int],
    ) -> tuple[Floats, Floats, Floats]:
        """Run a token with ``first`` experts of it and, from the same memory, with ``second``, which stays.

        Returns the logits of both and the hidden states that the second left. A memory that cannot be rolled
        back has the first in copies of the sequences.
        """
        if self._can_step_back:
            once, _ = self.run(tokens, sequences, position, first)
            self.step_back(sequences, position)
        else:
            copies = [self._n_seq + sequence for sequence in sequences]
            for sequence, copy in zip(sequences, copies, strict=True):
                self._api.llama_memory_seq_cp(self._memory, int(sequence), copy, -1, -1)
            once, _ = self.run(tokens, copies, position, first)
        again, left = self.run(tokens, sequences, position, second)
        return once, again, left

    def step_back(self, sequences: Sequence[int], position: int) -> None:
        """Forget ``position`` in ``sequences``."""
        for sequence in sequences:
            if not self._api.llama_memory_seq_rm(self._memory, int(sequence), position, -1):
                raise EngineError("this model's memory cannot be rolled back")

    def close(self) -> None:
        """Free the context."""
        if self.ctx:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self.ctx)
            self.ctx = 0

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _rows(self, getter: Any, n: int, width: int) -> Floats:
        address = getter(self.ctx)
        if not address:
            raise EngineError("this model gives no hidden states")
        return np.ctypeslib.as_array(address, shape=(n, width)).copy()


def sequences_kept(n_seq: int, has_copies: bool) -> int:
    """How many sequences a context needs."""
    return 2 * n_seq if has_copies else n_seq
