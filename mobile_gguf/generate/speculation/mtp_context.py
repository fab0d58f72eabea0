"""The model's own block for multi-token prediction (MTP), which drafts: its context, and what goes into it.

The block takes a token and the state that the model was left in at the token before, and says what comes
after the token. So states are taken from the model's own passes. Prompts are run through the block as they
come, what is said when it is to draft.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

from mobile_gguf.engine import mtp
from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.engine.log import clear_errors, last_errors
from mobile_gguf.errors import EngineError, ExpertReadError, MobileError

from ..decoder import Batch, Slice
from ..native import Native
from ..sampler import Sampler
from .states import LEAST, MOST, TextStates

_AHEAD = 16  # cells of tokens that are drafted and not counted as had


class MtpContext:
    """The block of a loaded model.

    ``wanted``: the numbers of sequences whose answers it may draft for, and whether it takes states of their
    prompts: without, these have the digits of logits that they have otherwise.
    """

    def __init__(self, native: Native, engine: Engine) -> None:
        self.wanted: dict[int, bool] = {}
        self.n_blocks = int(llama_cpp.llama_model_n_layer_nextn(native.model))
        self._native = native
        self._engine = engine
        self._ctx = native.block
        self._memory: Any = llama_cpp.llama_get_memory(self._ctx)
        self._calls = GuardedCalls(engine, native.model, self._ctx)
        self._n_embd = int(llama_cpp.llama_model_n_embd_out(native.model))
        self._batch = Batch(native.n_batch)
        self._texts = [TextStates(self._n_embd) for _ in range(native.n_sequences)]
        self._takes = False
        mtp.set_states(engine, self._ctx, True, only_outputs=True)

    @property
    def most(self) -> int | None:
        """Tokens of a draft, where each has a block of its own; None: as many as are wanted."""
        return self.n_blocks if self.n_blocks > 1 else None

    # around a decode of the model's own context

    def before(self, slices: Sequence[Slice]) -> None:
        """Have the decode of these leave states, if any of them is to be drafted for."""
        takes = any(map(self._is_taken, slices))
        if takes != self._takes:
            mtp.set_states(self._engine, self._native.ctx, takes)
            self._takes = takes

    def after(self, slices: Sequence[Slice]) -> None:
        """Take what the decode of these left. Raises ExpertReadError, EngineError."""
        start = 0
        for one in slices:
            text, n = self._texts[one.number], len(one.tokens)
            if self._is_taken(one):
                states = mtp.read_states(self._engine, self._native.ctx, start, n, self._n_embd)
                text.took(one.start, one.tokens, states)
                if _is_prompt(one):
                    self._catch_up(one.number, text.end)
                text.shorten(LEAST if _is_prompt(one) else MOST)
            else:
                text.skipped(one.start)
            start += n

    def _is_taken(self, one: Slice) -> bool:
        takes_prompts = self.wanted.get(one.number)
        return takes_prompts is not None and (takes_prompts or not _is_prompt(one))

    # drafts

    def follows(self, number: int, text: Sequence[int]) -> bool:
        """Whether it can draft what follows ``text``, whose last token the model has not run."""
        return self._texts[number].follows(text)

    def draft(
        self, number: int, text: Sequence[int], n: int, guessing: Sampler, is_end: Callable[[int], bool]
    ) -> list[int]:
        """At most ``n`` tokens that may follow ``text``, drawn by ``guessing``. Raises as ``after`` does."""
        known, last, place = self._texts[number], text[-1], len(text) - 1
        states = known.rows(place, place + 1)
        if self.n_blocks == 1:
            state = self._catch_up(number, place + 1, last)
        else:
            self._catch_up(number, place)
            state = self._run(number, place, [last], states)
        found = [self._calls.sample(guessing.chain, self._row)]
        while len(found) < n and not is_end(found[-1]):
            states = np.concatenate([states, state])
            if self.n_blocks == 1:
                state = self._run(number, place + len(found), found[-1:], state)
            else:  # each block has keys of its own, and sees what is drafted so far
                self._cut(number, place)
                state = self._run(number, place, [last, *found], states, len(found))
            found.append(self._calls.sample(guessing.chain, self._row))
        return found

    def _catch_up(self, number: int, end: int, last: int | None = None) -> mtp.States:
        """Run what the block has not had, to place ``end`` with ``last`` before it; returns its state."""
        text = self._texts[number]
        place, state = text.due(), np.empty((0, self._n_embd), np.float32)
        tokens = [*text.tokens[place - text.first :], *([] if last is None else [last])][: end - place]
        self._cut(number, place if text.had else 0)
        for begin in range(0, len(tokens), self._native.n_batch):
            piece = tokens[begin : begin + self._native.n_batch]
            start = place + begin
            for block in range(self.n_blocks):
                if block:
                    self._cut(number, start)
                state = self._run(number, start, piece, text.rows(start, start + len(piece)), block)
            text.had += piece
        return state

    def _run(
        self, number: int, start: int, tokens: Sequence[int], states: mtp.States, block: int = 0
    ) -> mtp.States:
        self._make_room(number, len(tokens))
        (self._row,) = self._batch.fill([Slice(number, start, tokens)])
        clear_errors()
        try:
            mtp.decode(self._engine, self._ctx, self._batch.batch, states, block)
        except BaseException as error:
            self._forget(number)
            if isinstance(error, RuntimeError):
                raise self._error(error) from None
            raise
        return mtp.read_states(self._engine, self._ctx, self._row, 1, self._n_embd)

    def _make_room(self, number: int, n: int) -> None:
        """Have cells for ``n`` tokens, where texts share them: those of the others go."""
        native = self._native
        if native.is_apart or native.n_sequences == 1:
            return
        if sum(len(text.had) for text in self._texts) + n + _AHEAD > native.n_ctx:
            for other in range(native.n_sequences):
                if other != number:
                    self._forget(other)

    def _cut(self, number: int, place: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, number, place, -1)

    def _forget(self, number: int) -> None:
        self._cut(number, 0)
        self._texts[number].had.clear()

    def _error(self, error: RuntimeError) -> MobileError:
        reason = self._engine.context_error(self._ctx)
        if reason:
            return ExpertReadError(reason)
        return EngineError(f"drafting failed: {last_errors() or error}")


def _is_prompt(one: Slice) -> bool:
    return len(one.tokens) > 1 and not one.is_drafted
