"""How long a draft is to be, from what passes take and how much of drafts is taken.

The length is the one that gives most tokens per second, 0 where none is expected to give ``GAIN`` more than
single tokens do. What does not pay is left alone, for twice as long each time, and then tried for a few
passes; and never more is lost than ``LOSS`` of the time. Pure: it is told what happened, and knows no clock.
Where no clock may decide, it is told no times, and reckons with stated ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import stated
from .acceptance import Acceptance
from .costs import Mean, StepCosts
from .source import USUALLY_RIGHT

MOST = 8
# What a draft has to be expected to win, as a share of the tokens per second.
GAIN = 1.03
# The share of the time that may be lost by drafts that did not pay.
LOSS = 0.03
# Passes of a trial, tokens of its drafts at most, and drafts on offer until what did not pay is tried again.
TRIAL, TRIAL_LENGTH = 3, 3
FIRST_PAUSE, LAST_PAUSE = 16, 1024
# Of drafts that are seen to be right or wrong where they are not run so many are looked at before one is, and
# none is where not even a pass that costs so little for each token more would pay.
LOOKS, CHEAP = 4, 0.2
# What would have to be so much better to pay is tried again after the longest pause only.
FAR = 1.25
# Drafted passes in a row before a single one shows again what single ones take.
IN_A_ROW = 12
# What was won counts against later losses up to so many single tokens' time; so much may be lost at first.
_SAVED, _AT_FIRST = 8.0, 2.0


@dataclass
class _Kind:
    """What is known of one kind of draft from one source."""

    pause: int = FIRST_PAUSE
    waits: int = 0  # offers until it is tried again
    trial: int = TRIAL  # passes that are left of a trial
    n_offers: int = 0  # while one could be made


class Tuner:
    """Lengths of drafts, at most ``most``; ``fixed`` is one that nothing changes, for measurements.
    A pass may want ``most_needs`` different experts, summed over the layers: beyond, it would drop its own.

    Drafts of a kind are taken to be alike. ``costs`` are of passes over one answer's tokens, ``together`` of
    those over several answers', which other kernels compute. With ``share``, of the experts that are in
    memory, what passes take is stated, else it is measured; so is what sources take, by ``takes``.
    """

    def __init__(
        self, most: int = MOST, share: float | None = None, takes: Mapping[str, float] | None = None
    ) -> None:
        self.most = most
        self.fixed: int | None = None
        self.most_needs = float("inf")
        self.runs_again = False  # whether what was taken of a draft is run again where some was refused
        self.is_timed = share is None
        self.costs = StepCosts() if share is None else stated.StatedCosts(share=share)
        self.together = StepCosts() if share is None else stated.StatedCosts(share=share)
        self.acceptance = Acceptance(most, USUALLY_RIGHT)
        self.drawing = Mean()  # seconds to draw a token from the logits
        self.keeping = Mean()  # to keep what a memory holds that cannot be rolled back
        self._takes = stated.DRAFTING if takes is None else takes
        self._drafting: dict[str, Mean] = {}  # a drafted token, by source
        self._kinds: dict[str, _Kind] = {}
        self._tried_as: dict[str, str] = {}  # of a kind the one that its trials count for
        self._balance = 0.0  # seconds that drafts have won, those of the last ones at most
        self._seconds = 0.0
        self._in_a_row = 0
        self._last = "", 0, ""  # the kind, tokens and source of what was on offer

    # what happened

    def begin(self) -> None:
        """An answer begins, whose text may be another."""
        self.acceptance.doubt()

    def tried(self, kind: str) -> None:
        """A draft was run."""
        known = self._known(kind)
        known.trial = max(0, known.trial - 1)
        self._in_a_row += 1

    def ran(self, source: str, n: int, n_taken: int, seconds: float) -> None:
        """A draft of ``n`` tokens was run for one answer alone, and gave ``n_taken`` of them and one more."""
        if not self.is_timed:
            seconds = self.costs.seconds_of(n + 1) + n * self._drafts(source)
        single = self.costs.seconds_of(1) + self.drawing.value
        self._balance = min(self._balance + (n_taken + 1) * single - seconds, _SAVED * single)
        self._seconds += seconds

    def ran_single(self, seconds: float) -> None:
        """A token was run without a draft, for one answer alone."""
        if self._in_a_row:  # what it took more is the draft's before it
            self._balance -= self.costs.anew_seconds
        self._seconds += seconds if self.is_timed else self.costs.seconds_of(1)
        self._in_a_row = 0

    def drafted(self, source: str, n: int, seconds: float) -> None:
        """A draft of ``n`` tokens took so long to make."""
        if n:
            self._drafting.setdefault(source, Mean()).add(seconds / n)

    def drew(self, seconds: float) -> None:
        """A token was drawn from logits."""
        if self.is_timed:
            self.drawing.add(seconds)

    def kept(self, seconds: float) -> None:
        """What a memory holds was kept, since it cannot be rolled back."""
        if self.is_timed:
            self.keeping.add(seconds)

    def saw(self, kind: str, place: int, is_taken: bool) -> None:
        """What became of the token at ``place`` of a draft, whether it was run or only compared."""
        self.acceptance.add(kind, place, is_taken)

    # what next

    def may_draft(self, n_answers: int = 1) -> bool:
        """Whether a pass has room for the experts of a drafted token of each answer, so that there is
        something to find out."""
        return self.fixed is not None or self._within_memory(1, n_answers) > 0

    def expect_needs(self, n: int) -> None:
        """A token wants so many different experts, summed over the layers, where that was not counted yet."""
        for costs in (self.costs, self.together):
            if not costs.n_needs.n:
                costs.n_needs.value = n

    def utility(self, kind: str, n: int, source: str = "", n_answers: int = 1) -> float:
        """Tokens per second of drafts of ``n``, in units of those without.

        ``n_answers`` are made at once, of which each has such a draft.
        """
        if n == 0:
            return 1.0
        tokens, costs = self.acceptance.expected(kind, n), self._costs_of(n_answers)
        again = self.acceptance.again(kind, n) if self.runs_again else 0.0
        own = tokens * self.drawing.value + n * self._drafts(source) + self.keeping.value
        seconds = costs.seconds_of(round(n_answers * (n + 1 + again))) + n_answers * own
        seconds += self._switches(n, n_answers) * costs.anew_seconds
        single = costs.seconds_of(n_answers) + n_answers * self.drawing.value
        return tokens * single / max(seconds, 1e-12)

    def _switches(self, n: int, n_answers: int) -> float:
        """How many more passes over another number of tokens than before a draft of ``n`` brings, there and
        back, than a single token would; of several answers hardly two passes are alike."""
        if n_answers > 1:
            return 1.0
        last = self.costs.n_last
        return (last != n + 1) + self.costs.leaves.value - (last != 1)

    def _costs_of(self, n_answers: int) -> StepCosts:
        return self.costs if n_answers == 1 else self.together

    def _drafts(self, source: str) -> float:
        if not self.is_timed:
            return stated.drafting(source, self._takes)
        return self._drafting[source].value if source in self._drafting else 0.0

    def best(self, kind: str, most: int, source: str = "", n_answers: int = 1) -> tuple[int, float]:
        """The length from 1 on with the largest utility, and that."""
        lengths = range(1, min(most, self.most) + 1)
        return max(((n, self.utility(kind, n, source, n_answers)) for n in lengths), key=lambda one: one[1])

    def foreseen(self, n_answers: int) -> float | None:
        """Tokens per second that so many answers have together, with drafts as the last that were on offer,
        of the best length for so many; None where it is not known what passes take."""
        costs = self._costs_of(n_answers)
        if not costs.is_known or not self.is_timed:
            return None
        kind, most, source = self._last
        most = min(self._within_memory(most, n_answers), self.most) if most else 0
        utility = max(1.0, self.best(kind, most, source, n_answers)[1]) if most else 1.0
        return n_answers * utility / max(costs.seconds_of(n_answers) + n_answers * self.drawing.value, 1e-12)

    def length(
        self, kind: str, most: int, source: str = "", n_answers: int = 1, *, is_free: bool = False
    ) -> int:
        """How many of ``most`` tokens on offer are to be drafted now.

        ``is_free``: how often they are right is seen where they are not run, too, so that only what passes
        take has to be tried.
        """
        if most <= 0:
            return 0
        self._last = kind, most, source
        if self.fixed is not None:
            return min(self.fixed, most)
        costs = self._costs_of(n_answers)
        shows_single = self._in_a_row >= IN_A_ROW or costs.is_in_doubt
        if not costs.is_known or (n_answers == 1 and shows_single):
            return 0
        most = self._within_memory(most, n_answers)
        if most <= 0:
            return 0
        n, utility = self.best(kind, most, source, n_answers)
        # where a trial only says what passes take it does so for all kinds
        self._tried_as[kind] = source if is_free and source else kind
        known = self._known(kind)
        while n and n_answers == 1 and not self._may_lose(n):
            n -= 1
        if not n or (n_answers == 1 and costs.wants_pair and utility < FAR):
            return 0
        if utility > GAIN:
            known.pause, known.trial, known.waits = FIRST_PAUSE, 0, 0
            return n
        if known.trial > 0:
            known.n_offers += 1
            if is_free and (known.n_offers <= LOOKS or not self._could_pay(kind)):
                return 0
            return min(n, TRIAL_LENGTH)
        if known.waits <= 0:
            known.waits, known.pause = known.pause, min(LAST_PAUSE, 2 * known.pause)
        known.waits -= 1
        if known.waits == 0 and (utility * FAR > GAIN or known.pause == LAST_PAUSE):
            known.trial = TRIAL
        return 0

    def _known(self, kind: str) -> _Kind:
        return self._kinds.setdefault(self._tried_as.get(kind, kind), _Kind())

    def _could_pay(self, kind: str) -> bool:
        """Whether drafts of a kind are right so often that on some machine they would pay."""
        lengths = range(1, TRIAL_LENGTH + 1)
        return any(self.acceptance.expected(kind, n) > GAIN * (1 + CHEAP * n) for n in lengths)

    def _within_memory(self, most: int, n_answers: int) -> int:
        if self.most_needs == float("inf"):
            return most
        costs = self._costs_of(n_answers)
        while most > 0 and costs.needs_of(n_answers * (most + 1)) > self.most_needs:
            most -= 1
        return most

    def _may_lose(self, n: int) -> bool:
        """Whether a draft of ``n`` of which nothing is taken would leave the losses within their share."""
        single = self.costs.seconds_of(1)
        at_most = self.costs.seconds_of(n + 1) + 2 * self.costs.anew_seconds - single
        return self._balance - at_most >= -LOSS * self._seconds - _AT_FIRST * single
