"""Mode ``auto``: rungs of the ladder for a budget of divergence that is kept, and audits that check it.

Before each token a rung is taken, from the lower hull of their prices, so that what has been spent stays
within the budget's running mean; two neighbours of the hull are mixed token by token. What a token cost is
foreseen (``loss_model``); a sampled share of tokens, at most ``AUDIT_SHARE`` of the work (``audit_cost``), is
run exactly as well, over the lossy pass's row: then the KL of the two is known, and corrects what is foreseen
of all others. No clock has a say in any of this: what was asked for and what is in memory decides.
An audit's KL is heavy-tailed, so tokens are drawn in proportion to what was foreseen of them (Hansen and
Hurwitz), whose ratio is far steadier than the KL itself (``correction``); and a margin of three standard
deviations is kept to the budget, wide while little is known and the answer short. A model that nobody
calibrated runs exactly, but for tokens that are run both ways, until these say what a rung costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mobile_gguf.engine.loss import LossRules, moved_share
from mobile_gguf.options.words import BUDDY, OFF, PRIOR

from ..passes.costs import Traffic
from ..passes.decode import ALL_EXPERTS, Pass, Steps
from .audit_cost import AuditCost, work_between
from .correction import Correction, TextCorrection
from .loss_model import LossModel
from .price_list import PriceList

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Standard deviations that are kept to the budget. Two let one text in ten cost 1.17 times a budget of .005.
_MARGIN = 3.0
# What is over or under the budget is made good within so many tokens.
_WITHIN = 32
# The most that is spent on a token, in budgets, to use up what was saved.
_MOST = 4.0
# Audits without which a model that nobody calibrated is run exactly.
LEARNT = 8
# The rungs of such a model, and the one that it is tried by.
_STEPS, _TRIED = (0.25, 0.5, 0.75, 1.0, 1.5), 0.75
# Rules that change nothing, but for what the engine connects: changing that anew takes it milliseconds.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Rung:
    """A rung that a token may be run by; ``rules`` None: exactly. ``kl`` is what it costs on average."""

    name: str
    rules: LossRules | None
    kl: float


class Auto:
    """What a model's answers in mode ``auto`` share: its rungs, and what audits have taught.

    ``share`` of all experts are in memory. ``prices`` None: nobody calibrated the model. ``can_audit`` says
    whether its memory can be rolled back, as running a token again needs; ``mass`` is what rungs divide kept
    weights by, ``n_expert_used`` the model's top-k, ``admit`` how many displaced experts of a layer and token
    are read while the disk is idle, at most.
    """

    def __init__(
        self,
        prices: PriceList | None,
        rules_of: dict[str, LossRules | None],
        share: float,
        can_audit: bool,
        mass: int = 0,
        n_expert_used: int = 1,
        admit: int = LossRules.admit,
    ) -> None:
        self.mass = mass
        self.n_expert_used = n_expert_used
        self.is_calibrated = prices is not None
        self.can_audit = can_audit
        self.model = prices.model_at(share) if prices is not None else LossModel()
        self.correction = Correction(self.model, self.is_calibrated)
        if prices is not None:
            hull = prices.hull(share)
            self.rungs = _alike([Rung(offer.rung, rules_of[offer.rung], offer.kl) for offer in hull])
        else:
            self.rungs = [Rung("exact", None, 0.0)] + [
                Rung(f"drop:{step:g}", LossRules(drop=step), (step / _TRIED) ** 1.5) for step in _STEPS
            ]
        self.rungs = [_admitting(rung, admit) for rung in self.rungs]
        self.cost = AuditCost()
        self._tried = 0.0  # what was foreseen of tokens under the rung that an unknown model is tried by
        self._n_tried = 0

    @property
    def is_known(self) -> bool:
        """Whether it may be said what a rung costs."""
        return self.is_calibrated or self._n_tried >= LEARNT

    @property
    def tried(self) -> Rung:
        """The rung that tells what rungs cost, where nobody calibrated."""
        return next(rung for rung in self.rungs if rung.rules is not None and rung.rules.drop == _TRIED)

    @property
    def may_audit(self) -> bool:
        return self.can_audit and self.cost.has_room

    def spend(self, max_kld: float, n_context: int) -> Spending:
        """An answer's budget, after so many tokens."""
        return Spending(self, max_kld, n_context)

    def unit(self) -> float:
        """What the rungs' ``kl`` are multiplied with: 1, or what is known of the one that was tried."""
        return 1.0 if self.is_calibrated else self._tried / max(1, self._n_tried)

    def audited(self, rung: Rung, whole: float) -> None:
        """A token of ``rung``, of which ``whole`` was foreseen, was run exactly as well."""
        if not self.is_calibrated and rung == self.tried:
            self._tried += whole
            self._n_tried += 1


def _alike(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs, all reading the router's scores if one of them does."""
    if not any(rung.rules is not None and rung.rules.reads_scores for rung in rungs):
        return list(rungs)
    return [replace(rung, rules=_reading(rung.rules)) for rung in rungs]


def _admitting(rung: Rung, most: int) -> Rung:
    if rung.rules is None:
        return rung
    return replace(rung, rules=replace(rung.rules, admit=min(rung.rules.admit, most)))


def _reading(rules: LossRules | None) -> LossRules | None:
    if rules is None or rules.reads_scores:
        return rules
    if rules.substitute == OFF:
        return replace(rules, substitute=PRIOR, prior=_NOTHING)
    return replace(rules, eta=_NOTHING) if rules.substitute == BUDDY else rules


class Spending:
    """One answer's budget of ``max_kld`` nats a token: what was spent, and what the next token may.

    ``n_context`` tokens are in the context before it, which lost nothing. ``seconds`` were spent on it, of
    them ``audit_seconds`` on audits and ``foreseeing_seconds`` on foreseeing what tokens cost; that is told,
    and decides nothing.
    """

    def __init__(self, auto: Auto, max_kld: float, n_context: int) -> None:
        self.auto = auto
        self.budget = max_kld
        self.n_tokens = 0
        self.n_audited = 0
        self.seconds = 0.0
        self.audit_seconds = self.foreseeing_seconds = 0.0
        self._counted: Traffic | None = None  # after the last pass
        self._n_context = n_context
        self._lost = 0.0  # by the tokens that are in the context now, summed
        self._own = self._history = 0.0  # foreseen of all tokens, as calibrated
        self.correction = TextCorrection(auto.correction)
        self._usual = 0.0  # own part of a token, on average over the last ones
        self._since_audit = 0.0  # ... summed
        self._until_audit = 0.5  # of the usual distance, in what is foreseen
        self._since_tried = 0
        self._in_audit = 0.0  # seconds of this token's
        self._mixed = 0.0

    @property
    def estimate(self) -> float:
        """The mean KL of the answer's tokens so far, as foreseen and corrected by audits, nats.

        Audits measure the own part, and correct that; history is as calibrated, where it is.
        """
        if not self.n_tokens:
            return 0.0
        factor = self.correction.factor
        of_history = 1.0 if self.auto.is_calibrated else factor
        return (factor * self._own + of_history * self._history) / self.n_tokens

    def allowed(self, n_tokens: int) -> float:
        """What ``n_tokens`` may cost by the estimate, so that the budget holds although it may be off."""
        model = self.auto.model
        off = math.hypot(self.correction.deviation, model.token_deviation / math.sqrt(max(1, n_tokens)))
        return n_tokens * self.budget / (1.0 + _MARGIN * off)

    def choose(self) -> Rung:
        """The rung of the next token."""
        rungs = self.auto.rungs
        if not self.auto.is_known:
            return rungs[0]
        n = self.n_tokens + 1
        mean = self.allowed(n) / n
        left = self.allowed(n) - self.estimate * self.n_tokens
        rate = min(max(mean + (left - mean) / _WITHIN, 0.0), _MOST * mean)
        if left <= 0:
            return rungs[0]
        unit = self.auto.unit() * self.correction.alarmed
        above = next((i for i in range(1, len(rungs)) if rungs[i].kl * unit > rate), len(rungs))
        if above == len(rungs):
            return rungs[-1]
        low, high = rungs[above - 1], rungs[above]
        self._mixed += (rate - low.kl * unit) / ((high.kl - low.kl) * unit)
        if self._mixed >= 1.0:
            self._mixed -= 1.0
            return high
        return low

    def run_token(self, steps: Steps, token: int) -> Pass:
        """Run a generated token by the rung that it may have, and again with all experts if it is audited."""
        started = time.perf_counter()
        is_trial = self._is_trial()
        rung = self.auto.tried if is_trial else self.choose()
        steps.use_experts(ALL_EXPERTS)
        before = self._counted or steps.traffic()
        steps.use_loss(rung.rules)
        steps.forward([token])
        ran = time.perf_counter()
        self._counted = after = steps.traffic()
        moved = moved_share(before.loss, after.loss)
        self.auto.cost.add_token(work_between(before, after, self.auto.n_expert_used))
        self.n_tokens += 1
        self._since_tried += 1
        if moved > 0 or self._lost > 0:
            self._account(steps, token, rung, moved, is_trial)
        self._n_context += 1
        ended = time.perf_counter()
        self.seconds += ended - started
        self.foreseeing_seconds += ended - ran - self._in_audit
        self.audit_seconds += self._in_audit
        self._in_audit = 0.0
        return Pass.BIG

    def _is_trial(self) -> bool:
        auto = self.auto
        is_due = self._since_tried >= auto.cost.every
        if auto.is_known or not auto.may_audit or not is_due:
            return False
        self._since_tried = 0
        return True

    def _account(self, steps: Steps, token: int, rung: Rung, moved: float, is_trial: bool) -> None:
        """What the token cost: foreseen, or measured if it is its turn."""
        import numpy as np

        from ..passes.divergence import log_softmax, row_divergence, spread_of

        model, before = self.auto.model, self._lost / max(1, self._n_context)
        logits = steps.last_logits()
        spread = spread_of(logits)
        own = model.own(rung.name, spread, moved)
        self._usual += (own - self._usual) / min(self.n_tokens, _WITHIN)
        self._since_audit += own
        if not (is_trial or self._is_audit(own)):
            self._own += own
            self._history += model.history(spread, before, moved)
            self._lost += model.lost(rung.name, moved)
            return
        started = time.perf_counter()
        log_q = log_softmax(np.array(logits, np.float64))
        kl = row_divergence(log_softmax(self._run_exactly(steps, token)), log_q)
        self.correction.add(kl, own, self._since_audit)
        self._since_audit = 0.0
        self.auto.audited(rung, own + model.history(spread, before, moved))
        self.n_audited += 1
        # its row is exact now; what the memory lost before it stays lost
        self._history += model.history(spread, before)
        self._in_audit = time.perf_counter() - started

    def _is_audit(self, own: float) -> bool:
        if own <= 0:
            return False
        self._until_audit -= own / self._usual / self.auto.cost.every
        if self._until_audit > 0 or not self.auto.may_audit:
            return False
        self._until_audit = max(self._until_audit + 1.0, 0.0)
        return True

    def _run_exactly(self, steps: Steps, token: int) -> npt.NDArray[np.float64]:
        import numpy as np

        assert self._counted is not None
        steps.step_back()
        steps.use_loss(None)
        steps.forward([token])
        before, self._counted = self._counted, steps.traffic()
        self.auto.cost.add_audit(work_between(before, self._counted, self.auto.n_expert_used))
        return np.array(steps.last_logits(), np.float64)
