"""One llama_decode: tokens at their places in, logits and hidden states out.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.engine.log import clear_errors, last_errors
from mobile_gguf.engine.loss import Buddies, LossRules, loss_counters, set_buddies, set_loss, set_lossy
from mobile_gguf.engine.rpc import context_loss
from mobile_gguf.engine.structs import LossCounters
from mobile_gguf.errors import EngineError, ExpertReadError, MobileError, UsageError

from .decode import ALL_EXPERTS
from .interrupt import stopping_on_request
from .native import Native

_states: Any = llama_cpp  # its types of these calls are narrower than what they take


class Batch:
    """Room for the tokens of one decode of one sequence; ``batch`` is what llama.cpp reads."""

    def __init__(self, n_max: int) -> None:
        self._tokens, self._places, self._counts, self._sequences = np.zeros((4, n_max), np.int32)
        self._outputs = np.zeros(n_max, np.int8)
        self._counts[:] = 1
        addresses = self._sequences.ctypes.data + self._sequences.itemsize * np.arange(n_max)
        self._addresses = addresses.astype(np.uintp)
        int32 = ctypes.POINTER(ctypes.c_int32)
        self.batch = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(int32),
            pos=self._places.ctypes.data_as(int32),
            n_seq_id=self._counts.ctypes.data_as(int32),
            seq_id=self._addresses.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, tokens: Sequence[int], start: int, every_output: bool) -> None:
        """Take ``tokens`` at the places from ``start`` on, for outputs of the last or of every one."""
        n = len(tokens)
        self.batch.n_tokens = n
        self._tokens[:n] = tokens
        self._places[:n] = np.arange(start, start + n)
        self._outputs[:n] = every_output
        self._outputs[n - 1] = True


class Decoder:
    """What runs tokens through a context, at most ``n_batch`` at a time, and knows what came of it.

    Decoding raises RuntimeError where llama.cpp fails, which ``error`` explains; the context stays usable.
    """

    def __init__(self, native: Native, calls: GuardedCalls, engine: Engine | None, on_devices: bool) -> None:
        self.native = native
        self.engine = engine  # None without a store to ask it about
        self.experts = ALL_EXPERTS
        self.buddies: Buddies | None = None  # that the rules for missing experts may need
        self.is_lossy = False  # whether the last pass might lose, and the next one may
        self._loss: LossRules | None = None  # that the engine was told
        self._mass = 0
        self._has_buddies = False  # it was told them, too
        self._calls = calls
        self._on_devices = on_devices
        self._batch = Batch(native.n_batch)
        self._keeps_states = False

    def use_experts(self, k: int) -> None:
        """Use at most ``k`` routed experts of every token from the next pass on; ALL_EXPERTS: the top-k."""
        if self.engine is not None and k != self.experts:
            self.engine.set_n_expert_used(self.native.ctx, k)
            self.experts = k

    def use_mass(self, n: int) -> None:
        """Divide the weights that a token keeps by the mass of its ``n`` heaviest, 0: by their own."""
        if self.engine is not None and n != self._mass:
            self.engine.checked("set_mass", "choosing what weights are divided by", self.native.ctx, n)
            self._mass = n

    def use_loss(self, rules: LossRules | None) -> None:
        """Have missing experts follow ``rules`` from the next pass on; None: all are read."""
        if self.engine is None:
            return
        ctx = self.native.ctx
        if rules is not None and rules != self._loss:
            if rules.needs_buddies and self.buddies is not None and not self._has_buddies:
                set_buddies(self.engine, ctx, self.buddies)
                self._has_buddies = True
            set_loss(self.engine, ctx, rules)
            self._loss = rules
        if (rules is not None) != self.is_lossy:
            set_lossy(self.engine, ctx, rules is not None)
            self.is_lossy = rules is not None

    def loss_counters(self) -> LossCounters:
        """What the rules did since the last reset; all zero without a store."""
        return loss_counters(self.engine, self.native.ctx) if self.engine is not None else LossCounters()

    def keep_states(self, keep: bool) -> None:
        """Whether the passes to come keep hidden states: then logits of every token are computed, too."""
        if keep != self._keeps_states:
            llama_cpp.llama_set_embeddings(self.native.ctx, keep)
            self._keeps_states = keep

    def run(self, tokens: Sequence[int], start: int, every_output: bool = False) -> None:
        """Run at most ``n_batch`` tokens at the places from ``start`` on."""
        self._batch.fill(tokens, start, every_output)
        self._calls.decode(self._batch)

    def cut(self, start: int) -> bool:
        """Drop the places from ``start`` on; False where the memory cannot."""
        return bool(llama_cpp.llama_memory_seq_rm(self.native.memory, 0, start, -1))

    def clear(self) -> None:
        """Drop all places, and the states of a recurrent memory; nothing for a model without a memory."""
        if self.native.memory:
            llama_cpp.llama_memory_clear(self.native.memory, not self.native.can_step_back)

    def state_bytes(self, partial: bool = False) -> int:
        """Bytes of ``save``."""
        return int(_states.llama_state_seq_get_size_ext(self.native.ctx, 0, _flags(partial)))

    def save(self, partial: bool = False) -> np.ndarray | None:
        """What the memory holds; ``partial``: only what cannot be rolled back. None if it cannot be had."""
        data = np.empty(self.state_bytes(partial), np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n = _states.llama_state_seq_get_data_ext(self.native.ctx, pointer, len(data), 0, _flags(partial))
        return data if 0 < n == len(data) else None

    def load(self, data: np.ndarray, partial: bool = False) -> bool:
        """Put what ``save`` gave in the place of what the memory holds; False if it did not take it."""
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not partial:
            self.cut(0)
        n = _states.llama_state_seq_set_data_ext(self.native.ctx, pointer, len(data), 0, _flags(partial))
        return n == len(data)

    def logits(self, i: int = -1) -> Any:
        """The logits [n_vocab] of output ``i``, until the next pass. Raises UsageError if there are none."""
        logits = llama_cpp.llama_get_logits_ith(self.native.ctx, i)
        if not logits:
            raise UsageError("there are no logits: ask for a token first")
        return np.ctypeslib.as_array(logits, shape=(self._calls.n_vocab,))

    def hidden(self, n_embd: int) -> Any | None:
        """The last token's hidden state [n_embd], if it was kept."""
        state = llama_cpp.llama_get_embeddings_ith(self.native.ctx, -1)
        return np.ctypeslib.as_array(state, shape=(n_embd,)) if state else None

    @contextlib.contextmanager
    def explained(self, should_stop: Callable[[], bool] | None = None, long: bool = True) -> Iterator[None]:
        """Passes that fail with a reason; Ctrl-C and ``should_stop`` end them if they are ``long``.

        Raises ExpertReadError, EngineError, KeyboardInterrupt, AnswerStopped.
        """
        clear_errors()
        try:
            with stopping_on_request(self.native.ctx, should_stop) if long else contextlib.nullcontext():
                yield
        except RuntimeError as error:
            raise self.error(error) from None

    def error(self, error: RuntimeError) -> MobileError:
        """A failed decode as the engine explains it."""
        lost = context_loss(self.native.ctx) if self._on_devices else ""
        if lost:
            return EngineError(lost)
        reason = self.engine.context_error(self.native.ctx) if self.engine is not None else ""
        if reason:
            return ExpertReadError(reason)
        return EngineError(f"decoding failed: {last_errors() or error}")


def _flags(partial: bool) -> int:
    return llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else llama_cpp.LLAMA_STATE_SEQ_FLAGS_NONE
