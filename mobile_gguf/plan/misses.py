"""How many of its experts a token misses under a budget: pure functions of share, geometry and policy.

``share`` is the budget over the bytes at which every expert stays. From a model's calibrated hotness where
it has one, else from the tables below, made by ``python -m mobile_gguf.bench.miss_curves``.

Source: the routing of Qwen3-30B-A3B and gemma-4-26B-A4B (128 experts a layer, top-6; a prompt of 27 tokens
and 128 decoded ones, github.com/Helldez/BigMoeOnEdge), replayed through the engine's eviction policies;
means of the two, which differ by 7% in the median. Rows for fewer experts come from the same traces with
experts merged at random.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mobile_gguf.options.words import DEFAULT_EVICTION

# Budget as a share of all experts; the columns of every table below.
SHARES = (0.04, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 0.85)

# (experts a layer, experts a token needs of it, misses per need in the steady state under `decay`)
STEADY: tuple[tuple[int, float, tuple[float, ...]], ...] = (
    (8, 1.00, (0.869, 0.808, 0.742, 0.683, 0.595, 0.501, 0.390, 0.249, 0.122, 0.047)),
    (8, 1.88, (0.913, 0.865, 0.802, 0.739, 0.652, 0.552, 0.439, 0.293, 0.137, 0.054)),
    (8, 2.66, (0.937, 0.892, 0.836, 0.775, 0.687, 0.590, 0.467, 0.309, 0.145, 0.055)),
    (8, 4.47, (0.969, 0.934, 0.888, 0.837, 0.758, 0.661, 0.538, 0.369, 0.181, 0.072)),
    (16, 1.00, (0.794, 0.733, 0.667, 0.598, 0.506, 0.410, 0.313, 0.200, 0.079, 0.025)),
    (16, 1.94, (0.847, 0.782, 0.716, 0.647, 0.558, 0.459, 0.345, 0.218, 0.090, 0.022)),
    (16, 2.83, (0.878, 0.814, 0.752, 0.681, 0.590, 0.492, 0.368, 0.226, 0.091, 0.024)),
    (16, 5.21, (0.924, 0.873, 0.815, 0.746, 0.652, 0.549, 0.424, 0.265, 0.111, 0.036)),
    (32, 1.00, (0.721, 0.646, 0.574, 0.507, 0.422, 0.334, 0.228, 0.115, 0.047, 0.013)),
    (32, 1.98, (0.771, 0.695, 0.626, 0.546, 0.451, 0.359, 0.255, 0.131, 0.038, 0.010)),
    (32, 2.93, (0.802, 0.724, 0.651, 0.574, 0.471, 0.369, 0.260, 0.142, 0.043, 0.010)),
    (32, 5.65, (0.862, 0.789, 0.716, 0.635, 0.532, 0.426, 0.301, 0.169, 0.059, 0.015)),
    (64, 1.00, (0.624, 0.546, 0.480, 0.406, 0.308, 0.218, 0.141, 0.072, 0.029, 0.027)),
    (64, 1.99, (0.680, 0.595, 0.514, 0.437, 0.342, 0.242, 0.141, 0.060, 0.020, 0.017)),
    (64, 2.98, (0.712, 0.627, 0.540, 0.451, 0.351, 0.257, 0.154, 0.063, 0.017, 0.013)),
    (64, 5.88, (0.769, 0.684, 0.604, 0.514, 0.403, 0.294, 0.188, 0.086, 0.019, 0.008)),
    (128, 1.00, (0.528, 0.442, 0.352, 0.270, 0.184, 0.127, 0.072, 0.051, 0.051, 0.051)),
    (128, 2.00, (0.566, 0.471, 0.389, 0.299, 0.196, 0.113, 0.057, 0.034, 0.034, 0.034)),
    (128, 3.00, (0.595, 0.490, 0.398, 0.314, 0.210, 0.123, 0.055, 0.027, 0.026, 0.026)),
    (128, 6.00, (0.660, 0.555, 0.455, 0.357, 0.253, 0.158, 0.076, 0.025, 0.019, 0.019)),
)

# Misses of a layer beyond the steady rate in the first tokens of an answer, as a share of its experts.
COLD = (0.015, 0.013, 0.023, 0.038, 0.041, 0.050, 0.055, 0.080, 0.086, 0.071)

# Misses of the other policies, as multiples of those of `decay`.
POLICY = {
    "decay": (1.0,) * len(SHARES),
    "lru": (1.22, 1.16, 1.21, 1.27, 1.23, 1.31, 1.12, 1.12, 1.12, 1.09),
    "moepic": (1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.07, 1.04, 1.04, 1.05),
}

# The engine misses more than the replay does: the prompt comes in one batch, and some slots serve reads
# ahead. From bench/results/qwen3-30b-a3b-trace.json, four arms: 1.10 to 1.16.
ENGINE_FACTOR = 1.12
# Half-width of the error band, as a share of the misses: the two traces, and that a third model is neither.
SPREAD = 0.25
# The same where the file has its own hotness.
SPREAD_CALIBRATED = 0.20

_EXPERTS = sorted({n_expert for n_expert, _, _ in STEADY})
_ANSWER_TOKENS = 128  # an answer's length where nothing says otherwise
# Of a prompt's tokens, those that choose experts as if none were popular.
_DRIFT = 0.03
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
    """``independent_rate`` of routing as popular as the traces'."""
    return independent_rate(share, [_popularity(n_expert, k)])


def _popularity(n_expert: int, k: float) -> list[float]:
    """Each expert's share of tokens, by rank: Zipf's law with a cut-off at a seventh of the experts, which
    bench/synthetic.py fitted to the traces."""
    weights = [(i + 1) ** -0.4 * math.exp(-i / (18 / 128 * n_expert)) for i in range(n_expert)]
    total = sum(weights)
    return [min(1.0, k * w / total) for w in weights]


def distinct_share(n_expert: int, k: float, n_tokens: int) -> float:
    """The share of a layer's experts that a pass of so many tokens needs.

    Text drifts: a few tokens in a hundred have no preference, the others that of the traces. Within 6% of
    both for passes of 1 to 155 tokens, all that they have.
    """
    if n_expert <= 0:
        return 0.0
    even = min(1.0, k / n_expert)
    shares = ((1 - _DRIFT) * p + _DRIFT * even for p in _popularity(n_expert, k))
    return sum(1 - (1 - p) ** n_tokens for p in shares) / n_expert


def miss_distribution(k: int, rate: float) -> list[float]:
    """Probabilities of 0 .. k misses in one layer, for independent needs (the mean is what the traces
    fix)."""
    return [math.comb(k, m) * rate**m * (1 - rate) ** (k - m) for m in range(k + 1)]
