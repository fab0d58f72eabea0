"""Several answers, one decode after another: what each waits for, and what goes into the next one.

An answer is made by code that knows nothing of others: it calls, and gets the logits. Where several are made
at once each is a greenlet, all of one thread, and ``Scheduler.run`` is where it waits; once all wait,
``advance`` decodes for as many of them as go together, and each goes on until it waits again. So nothing is
locked, and the order is always the same. The least recently served comes first, and of prompts no more is
taken at a time than a micro-batch holds.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from greenlet import getcurrent

from mobile_gguf.engine.structs import LossCounters
from mobile_gguf.errors import AnswerStopped, EngineError, MobileError

from ..context.decoder import Decoder, Slice
from ..context.wish import Task, Wish
from ..passes.costs import Costs, Meter, Share
from ..speculation.costs import usual_cost
from ..speculation.watch import StepWatch, watching
from .aside import Aside
from .growth import Growth
from .room import Room
from .together import Together
from .turns import Turns

if TYPE_CHECKING:
    from ..context.cells import Cells
    from ..context.sequence import TokenSequence
    from ..context.threads import FollowingThreads


Result = TypeVar("Result")


class Scheduler:
    """Decodes for the answers that are made at once, ``most`` at present, in ``sequences``.

    ``in_turn``: every decode is of one sequence. ``n_expert_used`` is the model's top-k, what a token asks.
    """

    def __init__(
        self,
        decoder: Decoder,
        sequences: Sequence[TokenSequence],
        meter: Meter,
        *,
        n_expert_used: int = 1,
        in_turn: bool = False,
        grows: bool = False,
    ) -> None:
        self.decoder = decoder
        self.threads: FollowingThreads | None = None
        self.watch: StepWatch | None = None  # while it is of use what decodes take
        self.sequences = sequences
        self._room = Room(sequences, decoder.native.n_ctx, is_shared=not decoder.native.is_apart)
        self._meter = meter
        self._top_k = max(1, n_expert_used)
        self._turns = Turns(self._room, decoder.native, in_turn=in_turn)
        self._growth = Growth(len(sequences), foresee=self._foresee) if grows else None
        self._waiting: list[Wish] = []
        self._alone: list[Task] = []
        self._aside = Aside()
        self.together = Together(is_shared=len(sequences) > 1 and not in_turn)
        self._n_decodes = 0
        self._own = sequences[0]  # of whoever is no task
        self.n_accepted = 0  # drafted tokens, since the last decode
        self.n_running = 0
        for sequence in sequences:
            sequence.scheduler = self

    # for those who make answers

    @property
    def most(self) -> int:
        return self._growth.now if self._growth is not None else len(self.sequences)

    @property
    def at_work(self) -> tuple[int, int]:
        """Answers in the making, and how many of them read their prompts; of any thread."""
        taken = [one for one in self.sequences if one.is_taken]
        return max(self.n_running, len(taken)), sum(one.reads_prompt for one in taken)

    def _foresee(self, n: int) -> float | None:
        """Tokens per second of so many answers together; 0 where the context has no room for their texts."""
        if self.watch is None:
            return None
        lengths = [len(one.tokens) for one in self.sequences if one.is_taken]
        if not self._room.has_cells(n * sum(lengths) / max(1, len(lengths))):
            return 0.0
        return self.watch.tuner.foreseen(n)

    @property
    def iteration_ms(self) -> tuple[float, float] | None:
        """Milliseconds that decodes of several tokens were to take, and took; None without drafts."""
        return self.watch.iterations.mean_ms if self.watch is not None else None

    def spawn(self, work: Callable[[], object]) -> None:
        """Begin an answer: ``work`` runs until it waits. There may be ``most`` of them."""
        self.n_running += 1
        self._go_on(Task(work))

    def _go_on(self, task: Task, *value: Any, error: BaseException | None = None) -> None:
        try:
            if error is not None:
                task.throw(error)
            else:
                task.switch(*value)
        finally:
            if task.dead:
                self.n_running -= 1

    @property
    def sequence(self) -> TokenSequence:
        """The one of the answer that runs, or that ran last."""
        task = getcurrent()
        return task.sequence or self._own if isinstance(task, Task) else self._own

    @property
    def joins(self) -> bool:
        """Whether who asks is one of several answers of a thread, and not the first."""
        return isinstance(getcurrent(), Task) and any(one.is_taken for one in self.sequences)

    @contextlib.contextmanager
    def seated(self, prompt: Sequence[int], only_big: bool) -> Iterator[TokenSequence]:
        """The sequence that a new answer is made in, the one that has most of its prompt."""
        self._meter.settle()
        task, sequence = getcurrent(), self._room.seat(self.sequences, prompt, only_big)
        if isinstance(task, Task):
            task.sequence = sequence
        else:
            self._own = sequence
        sequence.costs, sequence.prompt_evaluated, sequence.drafting = Costs(), 0, None
        try:
            yield sequence
        finally:
            self._room.leave(sequence)

    def settle(self) -> None:
        """Have what was counted so far belong to whom it belongs to."""
        self._meter.settle()

    def make_room(self, sequence: Cells, n_tokens: int) -> bool:
        """Have cells for what a sequence brings, those of texts that nobody goes on with."""
        return self._room.claim(sequence, n_tokens)

    def begin_alone(self, sequence: TokenSequence, n_tokens: int) -> None:
        """Decodes begin that are of one sequence only, and not ours: so many tokens in all, of new places."""
        task = getcurrent()
        if isinstance(task, Task):
            # until nobody needs the logits of the last decode any more
            self._alone.append(task)
            assert task.parent is not None
            task.parent.switch()
        with self._room.claims([wish.sequence for wish in self._waiting]):
            if not self._room.claim(sequence, n_tokens, at_once=True):
                raise EngineError("the context has no room for the text")
        self._forget_counters()
        self._meter.begin([Share(sequence.costs, n_tokens)])

    def restart_counters(self) -> None:
        """Count anew, while no answer is made."""
        self._forget_counters()
        self._meter.restart()

    def _forget_counters(self) -> None:
        if self.watch is not None:
            self.watch.forget()

    def run(self, wish: Wish) -> int:
        """Run some of the tokens, or all; returns how many. Raises what the decode raised."""
        task = getcurrent()
        if isinstance(task, Task):
            wish.task = task
            self._waiting.append(wish)
            assert task.parent is not None
            return task.parent.switch()
        if not self._room.claim(wish.sequence, len(wish.tokens)):
            raise EngineError("the context has no room for the answer")
        self._decode([(wish, len(wish.tokens))])
        return len(wish.tokens)

    def aside(self, work: Callable[[], Result]) -> Result:
        """What an answer needs that is no decode, and may be slow: on another thread while others go on."""
        task = getcurrent()
        if not isinstance(task, Task) or len(self.sequences) == 1:
            return work()
        return self._aside.run(task, work)

    # for the thread that decodes

    def advance(self) -> None:
        """One decode of what answers wait for, each of which goes on with what came of it."""
        self._go_on_without_us()
        for task, error, value in self.together.found():
            self._go_on(task, *value, error=error)
        for wish in [one for one in self._waiting if one.may_stop()]:
            self._waiting.remove(wish)
            self._wake(wish, error=AnswerStopped("the answer was stopped while it waited for its turn"))
        self._n_decodes += 1
        chosen, error = [(wish, 0) for wish in self._waiting], None
        try:
            with self._room.claims([wish.sequence for wish in self._waiting]):
                chosen = self._turns.choose(self._waiting)
            if chosen:
                self._decode(chosen)
        except BaseException as raised:  # it belongs to those whose decode it was
            error = raised
        for wish, n in chosen:
            wish.sequence.served_at = self._n_decodes
            was_before = wish.n_before > 0
            if error is None and was_before:
                del wish.tokens[:n]
                wish.n_before -= n
                continue
            self._waiting.remove(wish)
            # each has one of its own, since its answer so far is noted on it
            self._wake(wish, n, error=copy.copy(error) if isinstance(error, MobileError) else error)

    def stop(self) -> None:
        """End all answers."""
        while self._waiting or self._alone or self._aside.is_busy or self.together.is_waiting:
            self._go_on_without_us()
            for task in self.together.leave():
                self._go_on(task, error=AnswerStopped("the answer was stopped"))
            for wish in list(self._waiting):
                self._waiting.remove(wish)
                self._wake(wish, error=AnswerStopped("the answer was stopped"))
        self.n_running = 0  # a Ctrl-C may have struck between two of them

    def _go_on_without_us(self) -> None:
        """Those that waited for something else than a decode of ours go on."""
        alone, self._alone = self._alone[:1], self._alone[1:]
        for task in [*alone, *self._aside.done(is_wanted=not (alone or self._waiting))]:
            self._go_on(task)

    def close(self) -> None:
        """No answers will be made any more."""
        self._aside.close()

    def end(self) -> None:
        """Have all texts written that outlive the model, those in the context last."""
        cache = self.sequences[0].cache
        disk = cache.disk
        if disk is not None and disk.is_open:
            disk.flush()
            cache.clear()
            for sequence in sorted(self.sequences, key=lambda one: one.used_at):
                sequence.put_away(stays=False)
            disk.close()

    def _wake(self, wish: Wish, *value: Any, error: BaseException | None = None) -> None:
        assert wish.task is not None
        self._go_on(wish.task, *value, error=error)

    def _decode(self, chosen: Sequence[tuple[Wish, int]]) -> None:
        sequences = [wish.sequence for wish, _ in chosen]
        slices = [wish.first(n) for wish, n in chosen]
        is_long = any(wish.is_long for wish, _ in chosen)
        self._meter.begin([self._share(*pair) for pair in zip(sequences, slices, strict=True)])
        stops = [sequence.should_stop for sequence in sequences]

        def all_stop() -> bool:
            return all(stop is not None and stop() for stop in stops)

        n_guesses = sum(wish.is_guess for wish, _ in chosen)
        has_drafts = any(one.is_drafted for one in slices)
        # a token of one answer alone is timed by who asks for it
        threads = self.threads if not (is_long or n_guesses) and (self.n_running > 1 or has_drafts) else None
        if threads is not None:
            threads.before()
        started = time.perf_counter()
        with (
            self.decoder.explained(all_stop if all(stops) else None, long=is_long),
            watching(self.watch, [one.tokens for one in slices], is_plain=not (is_long or n_guesses)),
        ):
            for sequence in sequences:
                sequence.cut()
            rows = self.decoder.run(slices)
        if threads is not None:
            threads.after(sum(map(usual_cost, (len(one.tokens) for one in slices))) / len(slices))
        if self._growth is not None and not is_long:
            n_given = len(slices) - n_guesses + self.n_accepted
            self._growth.observe(self.n_running, n_given, time.perf_counter() - started)
            self.n_accepted = 0
        if sum(part.rules is not None for part in slices) > 1:
            self._meter.lost([self._lost(part, row) for part, row in zip(slices, rows, strict=True)])
        for sequence, part, row in zip(sequences, slices, rows, strict=True):
            sequence.took(part, row)

    def _lost(self, part: Slice, row: int) -> LossCounters:
        """What a token lost, beside others that may."""
        is_token = part.rules is not None and len(part.tokens) == 1
        return self.decoder.lost(row) if is_token else LossCounters()

    def _share(self, sequence: TokenSequence, part: Slice) -> Share:
        asked = len(part.tokens) * (min(part.experts, self._top_k) or self._top_k)
        return Share(sequence.costs, asked, asked if part.rules is not None else 0)
