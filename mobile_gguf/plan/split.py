"""Which leading segments to keep, and how much of the budget for each layer: MoEpic's configurator.

arXiv 2509.08342, by summaries; the search is ours. For each layer the number of kept segments and of experts
that have them is searched that leaves the least time; then quanta of 1% of the memory, or less where layers
are many, move from the layer that loses least to the one that gains most until the sum stops falling. Hit
rates are those of the model's own routing, by stack distances. What is found is replayed through a cache that
works as the engine's does, beside whole experts, and is chosen only if it is faster by ``WORTH``. What whole
experts took in the engine, and what was chosen beside them, sets the times right (``as_measured``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import UsageError
from mobile_gguf.options.words import DEFAULT_EVICTION

from .speed import Pass, Reads, layer_seconds
from .split_cache import Routes, Shape, missing_segments

# a split that is not faster by so much is not worth its bytes, nor more than the error of a prediction
WORTH = 0.03
# of the replayed tokens, those that fill the cache and are not counted
_WARM_UP = 0.25
_QUANTA = 100
_QUANTA_OF_A_LAYER = 4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What a token takes: a pass with all in memory, the reads of one expert (or its upload), and how much of
    what is missing is predicted rightly and moved while the layer before is computed, for ``window_s`` at
    most."""

    one: Pass
    reads: Reads
    precision: float = 0.0
    window_s: float = 0.0

    def layer_seconds(self, n_missing: float) -> float:
        """The experts of one layer of which so many are missing, or as many parts of some."""
        early = min(self.precision * n_missing, self._window_experts())
        return layer_seconds(self.one, n_missing - early, self.reads)

    def token_seconds(self, n_missing: npt.NDArray[np.float64]) -> float:
        """A token's time, on average over ``n_missing`` [n_tokens, n_layer]."""
        values, counts = np.unique(n_missing, return_counts=True)
        experts = sum(
            count * self.layer_seconds(value)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        )
        return self.one.rest_s + experts / len(n_missing)

    def _window_experts(self) -> float:
        one_s = self.reads.seconds(1.0)
        return self.window_s / one_s if one_s > 0 else 0.0


@dataclass(frozen=True)
class Outcome:
    """A split, and what a token takes under it: seconds, and bytes that it moves."""

    kept: tuple[int, ...]
    shares: tuple[float, ...]
    seconds: float
    n_bytes: float


@dataclass(frozen=True)
class Choice:
    """What a configurator weighed: whole experts, every share kept alike, and the best by layer."""

    whole: Outcome
    alike: tuple[Outcome, ...]
    by_layer: Outcome
    chosen: Outcome


def as_measured(choice: Choice, whole_s: float, chosen_s: float | None = None) -> Choice:
    """The choice with whole experts' time as it was measured, and others' set right by it.

    What was foreseen too low is what a pass takes besides, under any split; what was foreseen too high is
    reads that the disk makes faster now. ``chosen_s`` is what was measured of the split that was chosen: it
    stays only if it is faster by ``WORTH``.
    """
    foreseen = choice.whole.seconds
    besides = max(0.0, whole_s - foreseen)
    factor = min(1.0, whole_s / foreseen)

    def right(outcome: Outcome) -> Outcome:
        if outcome is choice.chosen and chosen_s is not None:
            return replace(outcome, seconds=chosen_s)
        return replace(outcome, seconds=factor * outcome.seconds + besides)

    whole = replace(choice.whole, seconds=whole_s)
    alike = tuple(right(one) for one in choice.alike)
    by_layer = right(choice.by_layer)
    if choice.chosen is choice.whole or (chosen_s is not None and not chosen_s < (1 - WORTH) * whole_s):
        return Choice(whole, alike, by_layer, whole)
    before, after = (*choice.alike, choice.by_layer), (*alike, by_layer)
    chosen = next(new for old, new in zip(before, after, strict=True) if old is choice.chosen)
    return Choice(whole, alike, by_layer, chosen)


def stack_distances(routes: Routes, n_expert: int) -> npt.NDArray[np.int64]:
    """For each need, how many experts of its layer were used since it was used itself.

    [n_tokens, n_layer, k]; ``n_expert`` for a first use, -1 for no expert. Of a token's experts the first
    counts as used last.
    """
    n_tokens, n_layer, k = routes.shape
    last = np.full((n_layer, n_expert), -1, np.int64)
    rows = np.arange(n_layer)[:, None]
    found = np.full(routes.shape, -1, np.int64)
    for time in range(n_tokens):
        ids = routes[time]
        safe = np.maximum(ids, 0)
        own = last[rows, safe]
        newer = (last[:, None, :] > own[:, :, None]).sum(-1)
        found[time] = np.where(ids < 0, -1, np.where(own < 0, n_expert, newer))
        layers, ranks = np.nonzero(ids >= 0)
        last[layers, ids[layers, ranks]] = time * k + k - 1 - ranks
    return found


def hit_shares(distances: npt.NDArray[np.int64], n_expert: int) -> Floats:
    """How likely j of a layer's needs hit if the N experts used last are there.

    [n_layer, N from 0 to n_expert, j from 0 to k].
    """
    n_tokens, n_layer, k = distances.shape
    shares = np.zeros((n_layer, n_expert + 1, k + 1))
    for layer in range(n_layer):
        of_layer = distances[:, layer]
        for n in range(n_expert + 1):
            hits = ((of_layer >= 0) & (of_layer < n)).sum(-1)
            shares[layer, n] = np.bincount(hits, minlength=k + 1) / n_tokens
    return shares


def configure(
    routes: Routes,
    shape: Shape,
    capacity: int,
    expert_bytes: int,
    costs: Costs,
    *,
    eviction: str = DEFAULT_EVICTION,
) -> Choice:
    """The split of a tier of ``capacity`` segments that takes least time; ``routes`` [n_tokens, n_layer, k].

    Raises UsageError if the budget or the text is too small.
    """
    if len(routes) < 8:
        raise UsageError("the text is too short: a split is chosen by the routing of at least 8 tokens")
    k, n = routes.shape[2], shape.n_segments
    if capacity < k * n:
        raise UsageError("the budget is smaller than the experts that a token uses in one layer")
    start = int(_WARM_UP * len(routes))

    def outcome(kept: Sequence[int], shares: Sequence[float]) -> Outcome:
        missing = missing_segments(routes, shape, capacity, kept, shares, eviction=eviction)[start:]
        experts = missing / n
        seconds = costs.token_seconds(experts)
        return Outcome(tuple(kept), tuple(shares), seconds, float(experts.sum(1).mean()) * expert_bytes)

    no_wish = (0.0,) * shape.n_layer
    whole = outcome((n,) * shape.n_layer, no_wish)
    alike = tuple(outcome((kept,) * shape.n_layer, no_wish) for kept in _steps(n))
    shares = hit_shares(stack_distances(routes, shape.n_expert), shape.n_expert)
    by_layer = outcome(*search(shares, shape, capacity, costs))
    best = min((*alike, by_layer), key=lambda one: one.seconds, default=whole)
    chosen = best if best.seconds < (1 - WORTH) * whole.seconds else whole
    return Choice(whole, alike, by_layer, chosen)


def _steps(n_segments: int) -> list[int]:
    """Numbers of kept segments to try alike in all layers: about the quarters."""
    return sorted({max(1, round(n_segments * share)) for share in (0.25, 0.5, 0.75)} - {n_segments})


def search(
    shares: Floats, shape: Shape, capacity: int, costs: Costs
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Kept segments and share of the budget of each layer, by ``hit_shares``."""
    k, n, n_layer = shares.shape[2] - 1, shape.n_segments, shape.n_layer
    # what a layer needs besides while it runs
    room = max(1, capacity - k * (n - 1))
    n_quanta = max(_QUANTA, _QUANTA_OF_A_LAYER * n_layer)
    quantum = room / n_quanta
    times = np.array(
        [[costs.layer_seconds(k - hits * kept / n) for hits in range(k + 1)] for kept in range(1, n + 1)]
    )
    seconds, kept = _by_quanta(shares, times, quantum, n_quanta, shape.n_expert)
    given = _move_quanta(seconds, n_quanta)
    chosen = kept[np.arange(n_layer), given]
    return tuple(chosen.tolist()), tuple((given / given.sum()).tolist())


def _by_quanta(
    shares: Floats, times: Floats, quantum: float, n_quanta: int, n_expert: int
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The least seconds of each layer with so many quanta, and the segments kept, [n_layer, n_quanta + 1]."""
    costs = shares @ times.T  # [n_layer, n_expert + 1, segments kept - 1]
    kept = np.arange(1, times.shape[0] + 1)
    n_tops = np.minimum(n_expert, (np.arange(n_quanta + 1)[:, None] * quantum / kept).astype(np.int64))
    found = costs[:, n_tops, kept - 1]  # [n_layer, n_quanta + 1, segments kept - 1]
    # of equals the most, down to whole experts
    best = times.shape[0] - 1 - np.argmin(found[:, :, ::-1], axis=-1)
    return np.take_along_axis(found, best[:, :, None], axis=-1)[:, :, 0], best + 1


def _move_quanta(seconds: Floats, n_quanta: int) -> npt.NDArray[np.int64]:
    """Quanta of each layer: evenly at first, then moved as long as the sum falls.

    One goes from where it costs least to where it gains most. Steps of a layer's curve are bridged, so that
    one quantum that buys nothing does not hide what the next one buys; then no other division is better.
    """
    n_layer = len(seconds)
    seconds = np.array([_convex(row) for row in seconds])
    given = np.full(n_layer, n_quanta // n_layer, np.int64)
    given[: n_quanta % n_layer] += 1
    rows = np.arange(n_layer)
    for _ in range(n_layer * n_quanta):
        now = seconds[rows, given]
        gain = now - seconds[rows, np.minimum(given + 1, n_quanta)]
        loss = np.where(given > 0, seconds[rows, np.maximum(given - 1, 0)] - now, np.inf)
        taker = int(np.argmax(gain))
        loss[taker] = np.inf
        giver = int(np.argmin(loss))
        if not gain[taker] > loss[giver] + 1e-15:
            break
        given[taker] += 1
        given[giver] -= 1
    return given


def _convex(values: Floats) -> Floats:
    """The largest convex curve that is nowhere above ``values``."""
    corners: list[int] = []
    for i in range(len(values)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (values[b] - values[a]) * (i - a) < (values[i] - values[a]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    return np.interp(np.arange(len(values)), corners, values[corners])
