"""What audits say of forecasts: by what factor a text costs more than was foreseen (``loss_model``).

An audit gives the ratio of what was measured to what was foreseen. Ratios are heavy-tailed and few, so they
are weighed against what is known otherwise: of a model by its calibration, of a text by the texts before it.
Pure arithmetic; the formulas are those of normal means with known variances, and an empirical Bayes rule
where audits contradict what was believed.
"""

from __future__ import annotations

import math
from collections import deque

from .loss_model import MOST, LossModel

# Of an audit's worth so much is left with each that comes after it, in another text or not.
_KEPT = 0.99
# Standard errors by which audits must contradict what was believed of a text, before that yields to them.
_CONTRADICTS = 3.0
# Texts that calibration did not see differ from what is foreseen of them by so much more than its own blocks
# do: .15 to .2 where they differ by .12.
_UNSEEN = 1.8
# The last audits that may raise an alarm, and by how many standard errors.
_RECENT, _ALARMS = 4, 2.0


class Correction:
    """The factor of a model's texts, from all audits; what was calibrated counts as some of ratio 1.

    The older, the less: so does the calibration. Without one nothing is known before the first audit.
    """

    def __init__(self, model: LossModel, is_calibrated: bool) -> None:
        self.model = model
        self.n = model.n_audits if is_calibrated else 0.0  # that it stands on
        self._sum = self.n

    @property
    def factor(self) -> float:
        """The mean; 1 as long as nothing is known."""
        return self._sum / self.n if self.n > 0 else 1.0

    @property
    def deviation(self) -> float:
        """Its standard error, relative to it; infinite as long as nothing is known."""
        return self.model.audit_deviation / math.sqrt(self.n) if self.n > 0 else math.inf

    def add(self, ratio: float) -> None:
        self.n = self.n * _KEPT + 1.0
        self._sum = self._sum * _KEPT + ratio


class TextCorrection:
    """The factor of one text, which begins as that of all texts before it.

    An audit stands for the ``mass`` of forecasts since the one before.
    """

    def __init__(self, known: Correction) -> None:
        self._known = known
        self._believed = known.factor
        self._spread = math.hypot(_UNSEEN * known.model.text_deviation, known.deviation) * self._believed
        self._error = known.model.audit_deviation * self._believed  # of one audit
        self._mass = self._squares = self._sum = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, measured: float, foreseen: float, mass: float) -> None:
        """An audit; one of which nothing was foreseen says nothing."""
        if foreseen <= 0 or mass <= 0:
            return
        most = MOST * self.factor if math.isfinite(self._spread) else math.inf
        ratio = min(measured / foreseen, most) / self._known.model.audit_mean
        self._mass += mass
        self._squares += mass * mass
        self._sum += mass * ratio
        self._recent.append(ratio)
        self._known.add(ratio)
        if not math.isfinite(self._spread):  # the first texts of an unknown model are one
            self._believed = self._known.factor
            self._error = self._known.model.audit_deviation * self._believed

    def _posterior(self) -> tuple[float, float]:
        """Mean and standard error."""
        if not math.isfinite(self._spread):
            return self._believed, self._known.deviation * self._believed
        n = self._mass * self._mass / self._squares if self._squares > 0 else 0.0
        # as if one more audit had said what was believed
        mean = (self._believed + (n * self._sum / self._mass if n > 0 else 0.0)) / (n + 1)
        error = self._error / math.sqrt(n + 1)
        spread = max(self._spread, abs(mean - self._believed) - _CONTRADICTS * error)
        weight = spread**2 / (spread**2 + error**2)
        return self._believed + weight * (mean - self._believed), math.sqrt(weight) * error

    @property
    def factor(self) -> float:
        """The mean; 1 as long as nothing is known."""
        return self._posterior()[0]

    @property
    def deviation(self) -> float:
        """Its standard error, relative to it; infinite as long as nothing is known."""
        mean, error = self._posterior()
        return error / mean if mean > 0 else math.inf

    @property
    def alarmed(self) -> float:
        """The factor, or what the last audits say at least, if that is more."""
        found, total = self.factor, 0.0
        for n, ratio in enumerate(reversed(self._recent), start=1):
            total += ratio
            found = max(found, total / n - _ALARMS * self._error / math.sqrt(n))
        return found
