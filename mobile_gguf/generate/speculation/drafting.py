"""An answer whose tokens are drafted and checked: one pass after another, each over as many as pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from .acceptance import verified
from .source import Offer, Source
from .tuner import Tuner


class Rows(Protocol):
    """What drafting needs of the sequence that the answer is made in."""

    n_wanted: int
    owed: list[int]  # tokens of the text that must be run once more, with the next one

    @property
    def n_left(self) -> int: ...  # tokens that the text may grow by
    def run_drafted(self, token: int, draft: Sequence[int]) -> None: ...
    def hold(self) -> bool: ...  # before tokens are guessed or run; False: nothing may be drafted
    def accept(self, token: int) -> bool: ...
    def drop_draft(self) -> None: ...


@dataclass
class Record:
    """What drafts did for an answer: tokens that were ``drafted`` and run, and ``accepted`` ones of them.

    Of the ``n_passes`` over drafts ``timed`` tokens came while no other answer was made, in ``seconds`` with
    what it took to draft them, and ``n_single`` without a draft in ``single_seconds``, of which ``n_back``
    followed a draft, in ``back_seconds``. ``foreseen`` has seconds that passes over drafts were to take, and
    those that they took.
    """

    source: str = ""
    drafted: int = 0
    accepted: int = 0
    n_passes: int = 0
    predicted: float = 0.0  # utilities, summed over passes
    timed: int = 0
    seconds: float = 0.0
    n_single: int = 0
    single_seconds: float = 0.0
    n_back: int = 0
    back_seconds: float = 0.0
    foreseen: list[tuple[float, float]] = field(default_factory=list)

    @property
    def pass_predicted_ms(self) -> float | None:
        """Milliseconds of a pass over a draft, with what others had in it, as they were foreseen."""
        return self._mean_ms(0)

    @property
    def pass_measured_ms(self) -> float | None:
        return self._mean_ms(1)

    def _mean_ms(self, which: int) -> float | None:
        n = len(self.foreseen)
        return 1e3 * sum(one[which] for one in self.foreseen) / n if n else None

    @property
    def mean_length(self) -> float:
        """Tokens of a draft."""
        return self.drafted / self.n_passes if self.n_passes else 0.0

    @property
    def utility_predicted(self) -> float | None:
        return self.predicted / self.n_passes if self.n_passes else None

    @property
    def utility_measured(self) -> float | None:
        """Tokens per second of drafted passes, in units of single ones', if this answer had both; what single
        tokens took more behind a draft is the draft's."""
        if not (self.timed and self.n_single and self.seconds > 0 and self.single_seconds > 0):
            return None
        n, seconds = self.n_single - self.n_back, self.single_seconds - self.back_seconds
        single = seconds / n if n else self.single_seconds / self.n_single
        back = max(0.0, self.back_seconds - self.n_back * single)
        return self.timed * single / (self.seconds + back)


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, which took ``seconds`` to guess."""

    tokens: list[int]
    source: str
    kind: str
    seconds: float


class Drafting:
    """Drafts for one answer in ``rows``, by the one of ``sources`` that promises most.

    ``run_single`` runs a token as without drafts, ``draw`` takes one from the logits at hand; ``cut`` leaves
    of a draft what may come at all, by its grammar and the model's end. ``n_answers`` have tokens in a pass;
    ``is_alone``: no others are made meanwhile, so that what time passes is this one's. ``last_pass``: seconds
    that it was to take, and those it took.
    """

    def __init__(
        self,
        tuner: Tuner,
        sources: Sequence[Source],
        rows: Rows,
        *,
        run_single: Callable[[int], object],
        draw: Callable[[], int],
        cut: Callable[[list[int]], list[int]],
        n_answers: Callable[[], int] = lambda: 1,
        is_alone: Callable[[], bool] = lambda: True,
        last_pass: Callable[[], tuple[float, float] | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tuner = tuner
        self._sources = list(sources)
        self._rows = rows
        self._run_single = run_single
        self._draw = draw
        self._cut = cut
        self._n_answers = n_answers
        self._is_alone = is_alone
        self._last_pass = last_pass
        self._clock = clock
        self.record = Record("+".join(source.name for source in sources))
        self._n_said = 0
        self._is_back = False  # the last pass was over a draft
        self._compared: list[tuple[str, list[int], int]] = []  # drafts that the answer is compared with

    def tokens(self, prompt: Sequence[int]) -> Generator[int, None, None]:
        """The answer's tokens without an end, once the prompt was run; one is run when the next is wanted."""
        for source in self._sources:
            source.add(prompt)
        token = self._said(self._draw())
        yield token
        while True:
            made = self._draft()
            if made is None:
                token = self._said(self._single(token))
                yield token
                continue
            with closing(self._several(token, made)) as several:
                for drawn, is_drafted in several:
                    token = self._said(drawn)
                    self.record.accepted += is_drafted
                    yield token

    # drafts

    def _draft(self) -> Draft | None:
        """A draft that is expected to pay."""
        rows = self._rows
        # the pass gives a token more than it drafts
        most = min(self._tuner.most, rows.n_left - 1, rows.n_wanted - self._n_said - 1)
        n_answers, tuner = self._n_answers(), self._tuner
        if most <= 0 or rows.owed or not tuner.may_draft(n_answers):
            return None
        if tuner.runs_again and n_answers > 1:
            return None  # several texts of such a memory go together only if all bring as many tokens
        best, kind, length, utility = None, "", 0, 0.0
        for source in self._sources:
            offered = source.offer(most)
            self._compare(source, offered)
            n = tuner.length(offered.kind, offered.n, source.name, n_answers, is_free=source.is_free)
            if n and (value := tuner.utility(offered.kind, n, source.name, n_answers)) > utility:
                best, kind, length, utility = source, offered.kind, n, value
        if best is None or not self._held():
            return None
        started = self._clock()
        drafted = best.draft(length)
        seconds = self._clock() - started
        if self._is_alone():
            tuner.drafted(best.name, len(drafted), seconds)
        draft = self._cut(drafted)
        if not best.is_free and drafted:
            self._compared.append((kind, drafted, 0))
        self.record.predicted += utility if draft else 0.0
        return Draft(draft, best.name, kind, seconds) if draft else None

    def _held(self) -> bool:
        started = self._clock()
        held = self._rows.hold()
        if self._tuner.runs_again:
            self._tuner.kept(self._clock() - started)
        return held

    def _compare(self, source: Source, offered: Offer) -> None:
        """Have the answer to come compared with what a source says, if it costs nothing to say it."""
        if source.is_free and offered.n:
            self._compared.append((offered.kind, source.draft(offered.n), 0))

    def _said(self, token: int) -> int:
        self._n_said += 1
        for source in self._sources:
            source.add([token])
        compared, self._compared = self._compared, []
        for kind, draft, place in compared:
            is_taken = draft[place] == token
            self._tuner.saw(kind, place, is_taken)
            if is_taken and place + 1 < len(draft):
                self._compared.append((kind, draft, place + 1))
        return token

    # passes

    def _single(self, token: int) -> int:
        is_alone, started = self._is_alone(), self._clock()
        self._run_single(token)
        drawn = self._drawn()
        is_back, self._is_back = self._is_back, False
        if is_alone:
            seconds = self._clock() - started
            self.record.n_single += 1
            self.record.single_seconds += seconds
            if is_back:
                self.record.n_back += 1
                self.record.back_seconds += seconds
            self._tuner.ran_single(seconds)
        return drawn

    def _drawn(self) -> int:
        started = self._clock()
        token = self._draw()
        self._tuner.drew(self._clock() - started)
        return token

    def _several(self, token: int, draft: Draft) -> Generator[tuple[int, bool], None, None]:
        """What a pass over a draft gives."""
        is_alone, started, n_given, n_taken = self._is_alone(), self._clock(), 0, 0
        seconds, n = draft.seconds, len(draft.tokens)
        self._rows.run_drafted(token, draft.tokens)
        self._is_back = True
        self._tuner.tried(draft.kind)
        if (foreseen := self._last_pass()) is not None:
            self.record.foreseen.append(foreseen)
        self.record.n_passes += 1
        self.record.drafted += n
        try:
            for drawn, is_drafted in verified(draft.tokens, self._drawn, self._rows.accept):
                seconds += self._clock() - started
                n_given, n_taken = n_given + 1, n_taken + is_drafted
                yield drawn, is_drafted
                started = self._clock()
        finally:
            self._rows.drop_draft()
            if is_alone and n_given:
                self.record.timed += n_given
                self.record.seconds += seconds
                self._tuner.ran(draft.source, n, n_taken, seconds)
