"""What audits cost beside all that is computed, counted and never timed: a seed gives one text on any clock.

Time goes into computing, reading and uploading. However long each of them takes, audits that have at most
a share of each have at most that share of the time: (a1 + a2 + ...) / (t1 + t2 + ...) is never above the
largest of a1/t1, a2/t2, ... Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from ..passes.costs import Traffic

# Of all work.
AUDIT_SHARE = 0.05
# ... that is aimed at: what is foreseen of every token takes a little, too, and is no audit.
_AIM = 0.045
# Tokens between two audits at least, and what an audit is taken to cost, in tokens, before one was run.
_CLOSEST, _FIRST_COST = 16, 1.5


@dataclass(frozen=True)
class Work:
    """What passes did, as parts of one with all experts; experts that were read and uploaded for them."""

    passes: float = 0.0
    read: float = 0.0
    uploaded: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.passes + other.passes, self.read + other.read, self.uploaded + other.uploaded)

    def times(self, factor: float) -> Work:
        """So many times the work."""
        return Work(self.passes * factor, self.read * factor, self.uploaded * factor)

    def share_of(self, other: Work) -> float:
        """The largest of its shares of another's kinds of work; infinite of what the other did nothing of."""
        shares = [
            a / b if b > 0 else float("inf")
            for a, b in zip(astuple(self), astuple(other), strict=True)
            if a > 0
        ]
        return max(shares, default=0.0)


def work_between(before: Traffic, after: Traffic, n_expert_used: int) -> Work:
    """The work of a pass of one token between two readings.

    Of a pass that left experts out no more than the others is counted, so that an exact one costs more.
    """
    was, now = before.loss, after.loss
    asked = (now.n_layers - was.n_layers) * n_expert_used
    left_out = (
        (now.n_dropped - was.n_dropped) + (now.n_left_out - was.n_left_out) + (now.n_partial - was.n_partial)
    )
    return Work(
        1.0 - left_out / asked if asked > 0 else 1.0,
        after.host.n_misses - before.host.n_misses,
        after.device.n_fetched - before.device.n_fetched,
    )


class AuditCost:
    """The work of a model's tokens and of their audits, and whether there is room for another audit."""

    def __init__(self) -> None:
        self.tokens = Work()  # without audits
        self.audits = Work()
        self.n_tokens = 0
        self.n_audits = 0

    def add_token(self, work: Work) -> None:
        self.tokens += work
        self.n_tokens += 1

    def add_audit(self, work: Work) -> None:
        self.audits += work
        self.n_audits += 1

    @property
    def share(self) -> float:
        """What audits have of all work, at most."""
        return self.audits.share_of(self.tokens + self.audits)

    def _expected(self) -> Work:
        """Of the next audit."""
        if self.n_audits:
            return self.audits.times(1 / self.n_audits)
        return self.tokens.times(_FIRST_COST / max(1, self.n_tokens))

    @property
    def every(self) -> float:
        """Tokens between two audits, so that they stay within their share."""
        if not self.n_audits or not self.n_tokens:
            return _FIRST_COST / _AIM
        return max(_CLOSEST, self._expected().share_of(self.tokens.times(1 / self.n_tokens)) / _AIM)

    @property
    def has_room(self) -> bool:
        """Whether another audit stays within the share."""
        audits = self.audits + self._expected()
        return self.n_tokens > 0 and audits.share_of(self.tokens + audits) <= AUDIT_SHARE
