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

from collections.abc import Callable, Generator, Sequence


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


class Acceptance:
    """How often the token at each place of a draft is taken, if those before it were; by kind of draft.

    What was seen fades, so that a text that changes is followed.
    """

    def __init__(self, most: int, first: float = 0.6) -> None:
        self._most = most
        self._first = first  # what is taken of a kind that was never seen
        self._seen: dict[str, list[list[float]]] = {}  # of a kind and place: how many, and taken of them

    def add(self, kind: str, place: int, is_taken: bool) -> None:
        """The token at ``place`` of a draft, from 0 on, was taken, or not; those before it were."""
        of_kind = self._seen.setdefault(kind, [[_FIRST, _FIRST * self._first] for _ in range(self._most)])
        seen = of_kind[place]
        seen[0] = seen[0] * _FADES + 1
        seen[1] = seen[1] * _FADES + is_taken

    def doubt(self) -> None:
        """Another text begins: what was seen counts as a few observations only."""
        for of_kind in self._seen.values():
            for seen in of_kind:
                share = min(1.0, _FIRST / seen[0])
                seen[0], seen[1] = seen[0] * share, seen[1] * share

    def at(self, kind: str, place: int) -> float:
        """The share that is taken at a place, from 0 on."""
        n, taken = self._seen.get(kind, [[1.0, self._first]] * self._most)[place]
        return taken / n

    def expected(self, kind: str, n: int) -> float:
        """Tokens that a pass over a draft of ``n`` gives: those taken, and one more."""
        every, reached = 1.0, 1.0
        for place in range(n):
            reached *= self.at(kind, place)
            every += reached
        return every

    def again(self, kind: str, n: int) -> float:
        """Tokens that are run again behind a draft of ``n``, where all are if one of it was refused."""
        found, reached = 0.0, 1.0
        for place in range(n):
            right = self.at(kind, place)
            found += (place + 1) * reached * (1.0 - right)
            reached *= right
        return found


# What is left of an observation when the next one comes, and how many there seem to be before the first.
_FADES = 0.97
_FIRST = 3.0
