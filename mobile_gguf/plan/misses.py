"""How many of its experts a token misses under a budget: pure functions of share, geometry and policy.

``share`` is the budget over the bytes at which every expert stays. From a model's calibrated hotness where
it has one, else from the curves of recorded traces (``curves.py``).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mobile_gguf.options.words import DEFAULT_EVICTION

from .curves import COLD, ENGINE_FACTOR, POLICY, SHARES, SPREAD, SPREAD_CALIBRATED, STEADY

_EXPERTS = sorted({n_expert for n_expert, _, _ in STEADY})
_ANSWER_TOKENS = 128  # an answer's length where nothing says otherwise
# Between the last tabulated share and all experts the misses go to zero on a line.
_ALL = 1.0


@dataclass(frozen=True)
class MissRate:
    """Misses per need, with the half-width of its error band as a share of it, and what it was taken from."""

    rate: float
    spread: float
    source: str  # "none", "traces" or "calibration"


def miss_rate(
    share: float,
    n_expert: int,
    k: float,
    *,
    policy: str = DEFAULT_EVICTION,
    n_tokens: int = _ANSWER_TOKENS,
    hotness: Sequence[Sequence[float]] | None = None,
) -> MissRate:
    """Misses per need of a token that uses ``k`` of ``n_expert`` experts a layer, in an answer of
    ``n_tokens``.

    ``hotness``: for each layer, the share of tokens that route to each expert. A rate never exceeds 1.
    """
    if share >= _ALL or k <= 0 or n_expert <= 0:
        return MissRate(0.0, 0.0, "none")
    k = min(k, n_expert)
    share = max(share, 0.0)
    steady = steady_rate(share, n_expert, k)
    source, spread = "traces", SPREAD
    if hotness:
        # what the traces say of order in time, and the file of who is popular
        popular = independent_rate(share, hotness)
        uniform = max(1e-6, 1 - share)
        own = min(1.0, popular * steady / max(_popular_traces(share, n_expert, k), 1e-6))
        steady = math.sqrt(steady * min(own, uniform, 1.0)) if own > 0 else steady
        source, spread = "calibration", SPREAD_CALIBRATED
    steady *= _interpolate(share, POLICY.get(policy, POLICY[DEFAULT_EVICTION]))
    cold = _interpolate(share, COLD) * n_expert / (k * max(n_tokens, 1))
    return MissRate(min(1.0, ENGINE_FACTOR * (steady + cold)), spread, source)


def steady_rate(share: float, n_expert: int, k: float) -> float:
    """Misses per need of a long answer under ``decay``, by the traces; log-linear between the tables'
    rows."""
    if share >= _ALL:
        return 0.0
    at = math.log2(min(max(n_expert, _EXPERTS[0]), _EXPERTS[-1]))
    right = min(bisect.bisect_left(_EXPERTS, 2**at - 1e-9), len(_EXPERTS) - 1)
    left = right if _EXPERTS[right] <= 2**at + 1e-9 else right - 1
    # a token's share of the experts, as the tables have it for their numbers of experts
    found = [_rate_of(_EXPERTS[i], k / n_expert * _EXPERTS[i], share) for i in (left, right)]
    span = math.log2(_EXPERTS[right] / _EXPERTS[left])
    weight = (at - math.log2(_EXPERTS[left])) / span if span else 0.0
    return found[0] + weight * (found[1] - found[0])


def _rate_of(n_expert: int, k: float, share: float) -> float:
    rows = [(math.log2(needs), rates) for n, needs, rates in STEADY if n == n_expert]
    at = math.log2(max(k, 1e-3))
    # beyond the rows at most one doubling goes on as the last one went
    at = min(max(at, rows[0][0]), rows[-1][0] + 1.0)
    right = min(max(bisect.bisect_left([x for x, _ in rows], at), 1), len(rows) - 1)
    (x0, low), (x1, high) = rows[right - 1], rows[right]
    a, b = _interpolate(share, low), _interpolate(share, high)
    rate = a + (b - a) * (at - x0) / (x1 - x0)
    return min(max(rate, 0.0), 1.0)


def _interpolate(share: float, values: Sequence[float]) -> float:
    """Linear in the share; to 1 (or the first value, for factors) below, to the last beyond the table."""
    if share <= SHARES[0]:
        return values[0]
    if share >= SHARES[-1]:
        if values[-1] >= 1:  # a factor
            return values[-1]
        return values[-1] * max(0.0, (_ALL - share) / (_ALL - SHARES[-1]))
    right = bisect.bisect_right(SHARES, share)
    x0, x1 = SHARES[right - 1], SHARES[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (share - x0) / (x1 - x0)


def independent_rate(share: float, hotness: Sequence[Sequence[float]]) -> float:
    """Misses per need if each token drew its experts by ``hotness`` alone, whatever came before it.

    Che's approximation for a cache of all layers together (Che, Tung, Wang 2002): an expert of probability p
    is resident with 1 - exp(-p t), where t makes the residents fill the cache.
    """
    flat = [p for layer in hotness for p in layer if p > 0]
    n_all = sum(len(layer) for layer in hotness)
    needs = sum(flat)
    capacity = share * n_all
    if not flat or needs <= 0:
        return 1.0
    if capacity >= len(flat):
        return 0.0
    low, high = 0.0, 1.0
    while sum(1 - math.exp(-p * high) for p in flat) < capacity and high < 1e9:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if sum(1 - math.exp(-p * middle) for p in flat) < capacity:
            low = middle
        else:
            high = middle
    return sum(p * math.exp(-p * high) for p in flat) / needs


def _popular_traces(share: float, n_expert: int, k: float) -> float:
    """``independent_rate`` of routing as popular as the traces': Zipf's law with a cut-off at a seventh of
    the experts, which bench/synthetic.py fitted to them."""
    weights = [(i + 1) ** -0.4 * math.exp(-i / (18 / 128 * n_expert)) for i in range(n_expert)]
    total = sum(weights)
    return independent_rate(share, [[min(1.0, k * w / total) for w in weights]])


def miss_distribution(k: int, rate: float) -> list[float]:
    """Probabilities of 0 .. k misses in one layer, for independent needs (the mean is what the traces
    fix)."""
    return [math.comb(k, m) * rate**m * (1 - rate) ** (k - m) for m in range(k + 1)]
