"""The model's own block for multi-token prediction (MTP), which drafts: its context, and what goes into it.

The block takes a token and the state that the model was left in at the token before, and says what comes
after the token. So states are taken from the model's own passes. Prompts are run through the block as they
come, what is said when it is to draft. What several answers want of it at once shares passes.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from llama_cpp import llama_cpp

from mobile_gguf.engine import mtp
from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.engine.log import clear_errors, last_errors
from mobile_gguf.errors import EngineError, ExpertReadError, MobileError

from ..context.decoder import Batch, Slice
from ..context.native import Native
from ..context.sampler import Sampler
from .states import LEAST, MOST, TextStates

Result = TypeVar("Result")


@dataclass(frozen=True)
class Wanted:
    """At most ``n`` tokens that may follow ``text`` in sequence ``number``, drawn by ``guessing``."""

    number: int
    text: Sequence[int]
    n: int
    guessing: Sampler
    is_end: Callable[[int], bool]


class _Pass(NamedTuple):
    """Tokens for a block, a state for each."""

    part: Slice
    states: mtp.States
    block: int


class _Left(NamedTuple):
    """What a pass leaves of its last token: its output, until the next pass, and the block's state."""

    row: int
    state: mtp.States


_Steps = Generator[_Pass, _Left, Result]  # passes that one after another are to be made


class _Work(NamedTuple):
    """Passes of sequence ``number``, which has at most ``n_cells`` cells meanwhile."""

    number: int
    n_cells: int
    steps: _Steps[Any]


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
        start, prompts = 0, [one for one in slices if _is_prompt(one) and self._is_taken(one)]
        for one in slices:
            text, n = self._texts[one.number], len(one.tokens)
            if self._is_taken(one):
                states = mtp.read_states(self._engine, self._native.ctx, start, n, self._n_embd)
                text.took(one.start, one.tokens, states)
            else:
                text.skipped(one.start)
            start += n
        ends = [(one.number, self._texts[one.number].end) for one in prompts]
        self._run_all([_Work(number, end, self._catch_up(number, end)) for number, end in ends])
        for one in slices:
            if self._is_taken(one):
                self._texts[one.number].shorten(LEAST if _is_prompt(one) else MOST)

    def _is_taken(self, one: Slice) -> bool:
        takes_prompts = self.wanted.get(one.number)
        return takes_prompts is not None and (takes_prompts or not _is_prompt(one))

    # drafts

    def follows(self, number: int, text: Sequence[int]) -> bool:
        """Whether it can draft what follows ``text``, whose last token the model has not run."""
        return self._texts[number].follows(text)

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """A draft for each, of whom ``follows`` is true; a pass for each place of all of them. Raises as
        ``after`` does."""
        return self._run_all([_Work(one.number, len(one.text) + one.n, self._draft(one)) for one in wanted])

    def _draft(self, wanted: Wanted) -> _Steps[list[int]]:
        number, text, n = wanted.number, wanted.text, wanted.n
        known, last, place = self._texts[number], text[-1], len(text) - 1
        states = known.rows(place, place + 1)
        try:
            if self.n_blocks == 1:
                left = yield from self._catch_up(number, place + 1, last)
            else:
                yield from self._catch_up(number, place)
                left = yield _Pass(Slice(number, place, [last]), states, 0)
            assert left is not None
            found = [self._sample(wanted, left)]
            while len(found) < n and not wanted.is_end(found[-1]):
                states = np.concatenate([states, left.state])
                if self.n_blocks == 1:
                    left = yield _Pass(Slice(number, place + len(found), found[-1:]), left.state, 0)
                else:  # each block has keys of its own, and sees what is drafted so far
                    self._cut(number, place)
                    left = yield _Pass(Slice(number, place, [last, *found]), states, len(found))
                found.append(self._sample(wanted, left))
        finally:  # others may need the cells of what was drafted
            self._cut(number, known.begin + len(known.had))
        return found

    def _sample(self, wanted: Wanted, left: _Left) -> int:
        return self._calls.sample(wanted.guessing.chain, left.row)

    def _catch_up(self, number: int, end: int, last: int | None = None) -> _Steps[_Left | None]:
        """Run what the block has not had, to place ``end`` with ``last`` before it, of which is returned what
        it left."""
        text = self._texts[number]
        place, left = text.due(), None
        tokens = [*text.tokens[place - text.first :], *([] if last is None else [last])][: end - place]
        self._cut(number, place if text.had else 0)
        for begin in range(0, len(tokens), self._native.n_batch):
            piece = tokens[begin : begin + self._native.n_batch]
            start = place + begin
            for block in range(self.n_blocks):
                if block:
                    self._cut(number, start)
                left = yield _Pass(Slice(number, start, piece), text.rows(start, start + len(piece)), block)
            text.had += piece
        return left

    # passes

    def _run_all(self, works: Sequence[_Work]) -> list[Any]:
        """What each comes to: all share passes if there are cells for all, else one is made after another."""
        if not self._make_room(works):
            return [found for one in works for found in self._run_all([one])]
        found: list[Any] = [None] * len(works)
        waiting: list[tuple[int, _Pass]] = []

        def go_on(i: int, left: _Left | None) -> None:
            try:
                waiting.append((i, works[i].steps.send(left)))  # pyright: ignore[reportArgumentType]
            except StopIteration as end:
                found[i] = end.value

        try:
            for i in range(len(works)):
                go_on(i, None)
            while waiting:
                going = _of_a_pass(waiting, self._native.n_batch)
                waiting[:] = [one for one in waiting if one not in going]
                for (i, _), left in zip(going, self._run([one for _, one in going]), strict=True):
                    go_on(i, left)
        finally:
            for one in works:
                one.steps.close()
        return found

    def _run(self, passes: Sequence[_Pass]) -> list[_Left]:
        """One pass of a block over tokens of different sequences."""
        rows = self._batch.fill([one.part for one in passes])
        states = np.concatenate([one.states for one in passes])
        clear_errors()
        try:
            mtp.decode(self._engine, self._ctx, self._batch.batch, states, passes[0].block)
        except BaseException as error:
            for one in passes:
                self._forget(one.part.number)
            if isinstance(error, RuntimeError):
                raise self._error(error) from None
            raise
        return [_Left(row, mtp.read_states(self._engine, self._ctx, row, 1, self._n_embd)) for row in rows]

    def _make_room(self, works: Sequence[_Work]) -> bool:
        """Have cells for them, where texts share them: those of others go. False: there are not enough for
        all of them at once."""
        native, numbers = self._native, {one.number for one in works}
        if native.is_apart or native.n_sequences == 1:
            return True
        n = sum(one.n_cells for one in works)
        if n > native.n_ctx and len(works) > 1:
            return False
        others = [other for other in range(native.n_sequences) if other not in numbers]
        if n + sum(len(self._texts[other].had) for other in others) > native.n_ctx:
            for other in others:
                self._forget(other)
        return True

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


def _of_a_pass(waiting: Sequence[tuple[int, _Pass]], n_batch: int) -> list[tuple[int, _Pass]]:
    """The first one, and those of the same block beside which there is room."""
    going: list[tuple[int, _Pass]] = []
    for one in waiting:
        n = len(one[1].part.tokens)
        if one[1].block == waiting[0][1].block and n <= n_batch:
            n_batch -= n
            going.append(one)
    return going
