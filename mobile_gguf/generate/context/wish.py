"""What an answer in the making waits for: tokens of its sequence that are to be run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from greenlet import greenlet

from mobile_gguf.engine.correction import Correction
from mobile_gguf.engine.loss import LossRules

from ..passes.decode import ALL_EXPERTS
from .decoder import Slice

if TYPE_CHECKING:
    from .sequence import TokenSequence


class Task(greenlet):
    """The making of an answer, which waits without a thread of its own."""

    sequence: TokenSequence | None = None


@dataclass(eq=False)
class Wish:
    """Tokens that a sequence wants next in its places; ``n_left``: with those of its prompt behind them.

    The others are as Slice has them. ``n_before`` of the tokens were in the context once: whoever waits for
    the rest does not hear of them.
    """

    sequence: TokenSequence
    tokens: list[int]
    n_left: int = 1
    experts: int = ALL_EXPERTS
    rules: LossRules | None = None
    every_output: bool = False
    keeps_state: bool = False
    mass: int = 0
    correction: Correction | None = None
    is_drafted: bool = False  # a generated token and those drafted behind it: no part of a prompt
    is_guess: bool = False  # it is run for a draft only
    n_before: int = 0
    task: Task | None = field(default=None, repr=False)

    @property
    def is_long(self) -> bool:
        return self.n_before > 0 or (len(self.tokens) > 1 and not self.is_drafted)

    @property
    def may_lack(self) -> bool:
        """Whether its tokens may run with fewer experts."""
        return self.experts != ALL_EXPERTS or self.rules is not None

    def goes_with(self, other: Wish) -> bool:
        """Whether one decode may be of both."""
        # asked for hidden states, llama.cpp makes logits of every token; and a context has one set of rules
        if (self.keeps_state and other.is_long) or (other.keeps_state and self.is_long):
            return False
        if self.may_lack and other.may_lack and self.mass != other.mass:
            return False
        # ... one mass and one correction
        is_little = ALL_EXPERTS not in (self.experts, other.experts)
        if is_little and self.correction != other.correction:
            return False
        if self.rules is None or other.rules is None:
            return True
        return self.rules == other.rules

    def may_stop(self) -> bool:
        """Whether it should end before it is run; a single token's answer asks for itself, right after it."""
        asked = self.sequence.should_stop if self.is_long or self.sequence.away else None
        return asked is not None and asked()

    def first(self, n: int) -> Slice:
        """The first ``n`` tokens, none of them behind the ``n_before``."""
        sequence = self.sequence
        start, tokens = len(sequence.tokens), self.tokens[:n]
        if self.n_before:
            return Slice(sequence.number, start, tokens)
        return Slice(
            sequence.number, start, tokens, self.experts, self.rules, self.every_output or self.is_drafted,
            self.keeps_state, self.mass, self.correction, self.is_drafted, self.is_guess,
        )  # fmt: skip
