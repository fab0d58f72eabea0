"""One llama_decode: tokens of sequences at their places in, logits and hidden states out.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_cpp import llama_cpp

from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.correction import Correction, set_corrected, set_correction
from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.engine.log import clear_errors, last_errors
from mobile_gguf.engine.loss import (
    Buddies,
    LossRules,
    set_batch_lossy,
    set_buddies,
    set_loss,
    set_lossy,
    token_loss,
)
from mobile_gguf.engine.rpc import context_loss
from mobile_gguf.engine.structs import GUESSED, LossCounters
from mobile_gguf.errors import EngineError, ExpertReadError, MobileError, UsageError

from ..passes.decode import ALL_EXPERTS
from .interrupt import stopping_on_request
from .native import Native

if TYPE_CHECKING:
    from ..passes.head import Head
    from ..speculation.mtp_context import MtpContext

_NONE, _DRAFT, _SOURCE = GUESSED  # which tokens of a decode are of the text
_states: Any = llama_cpp  # its types of these calls are narrower than what they take


@dataclass(frozen=True)
class Slice:
    """Tokens of one sequence for a decode: ``number`` is the sequence's, ``start`` the place of the first.

    ``experts``: at most so many routed ones a token, ALL_EXPERTS: the top-k. ``rules``: those that missing
    experts follow, None: all are read; ``mass``: of how many the weights that are kept are divided by the
    mass, 0: by their own; ``correction``: what makes up for experts that little tokens lack, None: nothing.
    ``every_output``: logits of every token, else of the last one only.
    """

    number: int
    start: int
    tokens: Sequence[int]
    experts: int = ALL_EXPERTS
    rules: LossRules | None = None
    every_output: bool = False
    keeps_state: bool = False  # the last token's hidden state
    mass: int = 0
    correction: Correction | None = None
    is_drafted: bool = False  # a generated token and those drafted behind it
    is_guess: bool = False  # one token that is run for a draft only

    @property
    def may_lack(self) -> bool:
        """Whether its tokens may run with fewer experts."""
        return self.experts != ALL_EXPERTS or self.rules is not None


class Batch:
    """Room for the tokens of one decode; ``batch`` is what llama.cpp reads."""

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

    def fill(self, slices: Sequence[Slice]) -> list[int]:
        """Take the slices, one after another; returns where in the batch the last token of each is."""
        end, last = 0, []
        for one in slices:
            begin, end = end, end + len(one.tokens)
            self._tokens[begin:end] = one.tokens
            self._places[begin:end] = np.arange(one.start, one.start + len(one.tokens))
            self._sequences[begin:end] = one.number
            self._outputs[begin:end] = one.every_output
            self._outputs[end - 1] = True
            last.append(end - 1)
        self.batch.n_tokens = end
        return last


class Decoder:
    """What runs tokens of sequences through a context, at most ``n_batch`` at a time, and knows what came.

    Decoding raises RuntimeError where llama.cpp fails, which ``error`` explains; the context stays usable.
    ``n_passes`` counts decodes, so that whoever has logits knows whether they are the last one's.
    """

    def __init__(self, native: Native, calls: GuardedCalls, engine: Engine | None, on_devices: bool) -> None:
        self.native = native
        self.engine = engine  # None without a store to ask it about
        self.head: Head | None = None  # that may say which tokens are important
        self.buddies: Buddies | None = None  # that the rules for missing experts may need
        self.as_with_ubatch = 0  # the micro-batch whose results are wanted where a larger one was chosen
        self.row_exact: Engine | None = None  # that can have tokens computed as each would be alone
        self.mtp: MtpContext | None = None  # that takes the states of some texts
        self.n_passes = 0
        self._experts = ALL_EXPERTS  # of tokens that no mask names
        self._is_lossy = False  # whether these may lose
        self._guessed = _NONE  # of the last decode's tokens, as the engine was told
        self._is_row_exact = False  # the last decode
        self._is_unsure = False  # a decode failed that may have left its masks
        self._loss: LossRules | None = None  # that the engine was told
        self._mass = 0
        self._correction: Correction | None = None  # that the engine was told,
        self._is_corrected = False  # and whether it is on
        self._has_buddies = False  # it was told them, too
        self._calls = calls
        self._on_devices = on_devices
        self._batch = Batch(native.n_batch)
        self._keeps_states = False

    def _use_experts(self, slices: Sequence[Slice]) -> None:
        """Have the tokens of the next decode use as many experts as their slices say."""
        if self.engine is None:
            return
        first, *others = {one.experts for one in slices}
        if not others and first != self._experts:
            self.engine.set_n_expert_used(self.native.ctx, first)
            self._experts = first
        if others or self._is_unsure:
            of_tokens = [one.experts for one in slices for _ in one.tokens]
            self.engine.set_batch_n_expert_used(self.native.ctx, of_tokens)

    def _use_mass(self, slices: Sequence[Slice]) -> None:
        """Have the weights of tokens that lack experts divided as their slices say, which say the same."""
        n = next((one.mass for one in slices if one.may_lack), self._mass)
        if self.engine is not None and n != self._mass:
            self.engine.checked("set_mass", "choosing what weights are divided by", self.native.ctx, n)
            self._mass = n

    def _use_correction(self, slices: Sequence[Slice]) -> None:
        """Have little tokens corrected as their slices say, which say the same.

        What the engine was told stays in its graphs, where it changes nothing while it is off.
        """
        little = next((one for one in slices if one.experts != ALL_EXPERTS), None)
        if self.engine is None or little is None:
            return
        wanted = little.correction
        if wanted is not None and wanted != self._correction:
            set_correction(self.engine, self.native.ctx, wanted)
            self._correction, self._is_corrected = wanted, False
        if (wanted is not None) != self._is_corrected:
            set_corrected(self.engine, self.native.ctx, wanted is not None)
            self._is_corrected = wanted is not None

    def _use_loss(self, slices: Sequence[Slice]) -> None:
        """Have missing experts in the next decode follow the rules of the slices, which are the same."""
        if self.engine is None:
            return
        ctx = self.native.ctx
        rules = next((one.rules for one in slices if one.rules is not None), None)
        if rules is not None and rules != self._loss:
            if rules.needs_buddies and self.buddies is not None and not self._has_buddies:
                set_buddies(self.engine, ctx, self.buddies)
                self._has_buddies = True
            set_loss(self.engine, ctx, rules)
            self._loss = rules
        first, *others = {one.rules is not None for one in slices}
        if not others and first != self._is_lossy:
            set_lossy(self.engine, ctx, first)
            self._is_lossy = first
        if others or self._is_unsure:
            of_tokens = [one.rules is not None for one in slices for _ in one.tokens]
            set_batch_lossy(self.engine, ctx, of_tokens)

    def _expect_drafts(self, slices: Sequence[Slice]) -> None:
        """Have drafted tokens not count as uses yet, and those of one answer get the bits of single ones."""
        has_drafts = any(one.is_drafted for one in slices)
        has_guesses = any(one.is_guess for one in slices)
        guessed = _DRAFT if has_drafts or has_guesses else _NONE
        if all(one.is_guess for one in slices):
            guessed = _SOURCE
        if self.engine is not None and guessed != self._guessed:
            self.engine.set_guessed(self.native.ctx, guessed)
        self._guessed = guessed
        on = has_drafts and len(slices) == 1
        if self.row_exact is not None and on != self._is_row_exact:
            self.row_exact.set_row_exact(self.native.ctx, on)
            self._is_row_exact = on

    def refuse(self, places: Sequence[int]) -> None:
        """Have drafted tokens of the last decode, by their outputs, count as never run."""
        if self.engine is not None and self._guessed == _DRAFT and places:
            self.engine.refuse(self.native.ctx, places)

    def _refuse_guesses(self, slices: Sequence[Slice], last: Sequence[int]) -> None:
        """Have what was run for a draft, beside others' tokens, count as never run."""
        self.refuse([place for one, place in zip(slices, last, strict=True) if one.is_guess])

    def keep_states(self, keep: bool) -> None:
        """Whether the passes to come keep hidden states: then logits of every token are computed, too."""
        if keep != self._keeps_states:
            llama_cpp.llama_set_embeddings(self.native.ctx, keep)
            self._keeps_states = keep

    def run(self, slices: Sequence[Slice]) -> list[int]:
        """One decode of slices of different sequences; returns the number of each one's last output.

        Of rules for missing experts there may be one among them.
        """
        last = self._batch.fill(slices)
        self._use_loss(slices)
        self._use_mass(slices)
        self._use_correction(slices)
        self._use_experts(slices)
        self._expect_drafts(slices)
        self.keep_states(any(one.keeps_state for one in slices))
        self.n_passes += 1
        self._is_unsure = True
        if self.mtp is not None:
            self.mtp.before(slices)
        self._calls.decode(self._batch)
        self._is_unsure = False
        self._refuse_guesses(slices, last)
        if self.mtp is not None:
            self.mtp.after(slices)
        return last

    def cut(self, start: int, number: int = 0) -> bool:
        """Drop a sequence's places from ``start`` on; False where the memory cannot."""
        return bool(llama_cpp.llama_memory_seq_rm(self.native.memory, number, start, -1))

    def copy(self, number: int, to: int, n: int) -> None:
        """Have the first ``n`` places of a sequence be those of another, too, which has none."""
        llama_cpp.llama_memory_seq_cp(self.native.memory, number, to, 0, n)

    def clear(self, number: int = 0) -> None:
        """Drop a sequence's places, or its state of a recurrent memory; nothing without a memory."""
        if not self.native.memory:
            return
        if self.native.n_sequences == 1:
            llama_cpp.llama_memory_clear(self.native.memory, not self.native.can_step_back)
        else:
            self.cut(0, number)

    def state_bytes(self, partial: bool = False, number: int = 0) -> int:
        """Bytes of ``save``."""
        return int(_states.llama_state_seq_get_size_ext(self.native.ctx, number, _flags(partial)))

    def save(self, partial: bool = False, number: int = 0) -> np.ndarray | None:
        """What the memory holds of a sequence, if it can be had; ``partial``: what cannot be rolled back."""
        data = np.empty(self.state_bytes(partial, number), np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n = _states.llama_state_seq_get_data_ext(self.native.ctx, pointer, len(data), number, _flags(partial))
        return data if 0 < n == len(data) else None

    def load(self, data: np.ndarray, partial: bool = False, number: int = 0) -> bool:
        """Put what ``save`` gave in the place of what the memory holds; False if it did not take it."""
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not partial:
            self.cut(0, number)
        n = _states.llama_state_seq_set_data_ext(self.native.ctx, pointer, len(data), number, _flags(partial))
        return n == len(data)

    def logits(self, i: int = -1) -> Any:
        """The logits [n_vocab] of output ``i``, until the next pass. Raises UsageError if there are none."""
        logits = llama_cpp.llama_get_logits_ith(self.native.ctx, i)
        if not logits:
            raise UsageError("there are no logits: ask for a token first")
        return np.ctypeslib.as_array(logits, shape=(self._calls.n_vocab,))

    def lost(self, i: int) -> LossCounters:
        """What rules for missing experts did to the token of output ``i`` in the last pass."""
        return token_loss(self.engine, self.native.ctx, i) if self.engine is not None else LossCounters()

    def hidden(self, n_embd: int, i: int = -1) -> Any | None:
        """The hidden state [n_embd] of output ``i``, if it was kept."""
        state = llama_cpp.llama_get_embeddings_ith(self.native.ctx, i)
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
