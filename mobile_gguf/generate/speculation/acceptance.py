"""Which tokens of a draft an answer takes: those that it would have said.

The rule of speculative sampling (Leviathan, Kalman and Matias, arXiv 2211.17192) accepts a drafted token x
with probability min(1, p(x)/q(x)) and else draws from what p has over q. A draft that names one token has
q(x) = 1: it is accepted with probability p(x), and else another is drawn by p among the others. That is what
comes of one draw by p that is compared with the draft, and so it is done here: the answer's own sampler draws
each token, with its grammar, penalties and biases, as often as without a draft. The distribution is the
model's, and so is the text of a seed. A source that guesses by a model draws with a copy of the sampler, so
that the same random number chooses in both.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass


def verified(
    draft: Sequence[int], draw: Callable[[], int], accept: Callable[[int], bool]
) -> Generator[tuple[int, bool], None, None]:
    """Tokens that one pass over a draft gives an answer, one at least, and whether each was drafted.

    ``draw`` takes a token from the logits at hand; when the next one is wanted, ``accept`` has
    those after a drafted token be at hand, and says whether it could.
    """
    for drafted in [*draft, None]:
        token = draw()
        yield token, token == drafted
        if token != drafted or not accept(token):
            return


# What is left of an observation when the next one comes; how many what is known of the place before counts
# as, what was seen in other texts at most, and the place before at least beside that.
_FADES = 0.97
_BEFORE = 2.0
_DOUBTED, _AGAIN = 3.0, 1.0


@dataclass
class _Seen:
    """``taken`` of ``n`` tokens at one place, and what the place before counts as beside them."""

    n: float = 0.0
    taken: float = 0.0
    before: float = _BEFORE

    def add(self, is_taken: bool) -> None:
        self.n = self.n * _FADES + 1
        self.taken = self.taken * _FADES + is_taken
        self.before *= _FADES

    def doubt(self) -> None:
        share = min(1.0, _DOUBTED / (self.n + self.before))
        self.n, self.taken, self.before = self.n * share, self.taken * share, self.before * share

    def rate(self, of_before: float) -> float:
        return (self.taken + self.before * of_before) / (self.n + self.before)


class Acceptance:
    """How often the token at each place of a draft is taken, if those before it were; by kind of draft.

    What was seen fades, so that a text that changes is followed. Of a place little is known of it is taken
    to be as the place before, of the first as ``usual`` says of the kind, else ``first``.
    """

    def __init__(self, most: int, usual: Mapping[str, float] | None = None, first: float = 0.6) -> None:
        self._most = most
        self._usual = usual or {}
        self._first = first
        self._seen: dict[str, list[_Seen]] = {}  # by kind, and place
        self._rates: dict[str, list[float]] = {}  # what ``rates`` said since the last that was seen

    def add(self, kind: str, place: int, is_taken: bool) -> None:
        """The token at ``place`` of a draft, from 0 on, was taken, or not; those before it were."""
        of_kind = self._seen.setdefault(kind, [_Seen() for _ in range(self._most)])
        of_kind[place].add(is_taken)
        self._rates.pop(kind, None)

    def doubt(self) -> None:
        """Another text begins: what was seen counts as a few observations only."""
        for of_kind in self._seen.values():
            for place, seen in enumerate(of_kind):
                seen.doubt()
                if place:  # those that are drafted no more are tried again where the ones before are right
                    seen.before = max(seen.before, _AGAIN)
        self._rates.clear()

    def rates(self, kind: str) -> list[float]:
        """The share that is taken at each place, from 0 on."""
        known = self._rates.get(kind)
        if known is None:
            rate, known = self._usual.get(kind, self._first), []
            for seen in self._seen.get(kind) or [_Seen()] * self._most:
                rate = seen.rate(rate)
                known.append(rate)
            self._rates[kind] = known
        return known

    def at(self, kind: str, place: int) -> float:
        """The share that is taken at a place, from 0 on."""
        return self.rates(kind)[place]

    def expected(self, kind: str, n: int) -> float:
        """Tokens that a pass over a draft of ``n`` gives: those taken, and one more."""
        every, reached = 1.0, 1.0
        for rate in self.rates(kind)[:n]:
            reached *= rate
            every += reached
        return every

    def again(self, kind: str, n: int) -> float:
        """Tokens that are run again behind a draft of ``n``, where all are if one of it was refused."""
        found, reached = 0.0, 1.0
        for place, right in enumerate(self.rates(kind)[:n]):
            found += (place + 1) * reached * (1.0 - right)
            reached *= right
        return found
