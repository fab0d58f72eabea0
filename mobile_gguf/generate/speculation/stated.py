"""What passes take where no clock may say it: fixed figures, so that the same run makes the same passes.

Under ``--deterministic`` the length of drafts must not hang on how fast the machine is just now, for it says
which experts are in memory afterwards. How many experts passes want is counted as elsewhere: counts are the
same each time. In units of a single token's computation, with a share f of the experts in memory:

    c(n) = 1 + .6 (n - 1),    waits(n) = 4 (1 - f)^2 n^.92

The first is what kernels of single rows took (docs/speculation.md). The second is drawn through what a token
of a real trace waited for a disk at an eighth and a quarter in memory, three and two times what it computed;
n tokens that follow each other wait for little less than n single ones, whose experts a cache has as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mobile_gguf.options.words import DRAFT, LITTLE, NGRAM

from .costs import Step, StepCosts, usual_cost

_WAIT, _READS = 4.0, 0.92
# What a source takes for a drafted token, in the same units.
DRAFTING = {NGRAM: 0.0, LITTLE: 0.8, DRAFT: 0.2}
_OTHERS = 0.2


def drafting(source: str) -> float:
    """What a token takes that a source drafts."""
    return DRAFTING.get(source, _OTHERS)


@dataclass
class StatedCosts(StepCosts):
    """Costs that nothing changes; ``share`` of the experts are in memory. Needs are counted."""

    share: float = 1.0

    @property
    def is_in_doubt(self) -> bool:
        return False

    def observe(self, step: Step) -> None:
        # what it took is left out: it would say when passes count as known
        super().observe(replace(step, seconds=usual_cost(step.n_tokens), waited=0.0))

    def seconds_of(self, n_tokens: int) -> float:
        """What a pass over so many tokens takes, in units of what a single token computes."""
        return usual_cost(n_tokens) + _WAIT * (1.0 - self.share) ** 2 * n_tokens**_READS
