"""Replaying a trace through an expert cache: misses under an eviction policy, and under the bound.

The cache holds ``capacity`` experts of all layers together, as the engine's store does. Steps run in
order, layers within a step in order; the experts of one layer are needed together. All functions are
pure: the same trace gives the same counts.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .trace import Trace

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Accesses:
    """What a trace asks of the cache: ``needs[i]`` are the distinct ids (layer * n_expert + expert) of one
    layer in one step, ``steps[i]`` and ``layers[i]`` say which, ``counted[i]`` whether its misses count."""

    needs: list[Ids]
    steps: list[int]
    layers: list[int]
    counted: list[bool]
    n_layer: int
    n_expert: int

    @property
    def n_counted(self) -> int:
        return sum(self.counted)


def accesses(trace: Trace, k: int, *, prompt_k: int | None = None, n_decode: int | None = None) -> Accesses:
    """The trace with the ``k`` best experts a token (``prompt_k`` in the prompt, by default also ``k``).

    Only decoding is counted: the prompt warms the cache. ``n_decode`` cuts the trace after so many.
    """
    cut = trace if n_decode is None else trace.first(trace.n_prompt + n_decode)
    result = Accesses([], [], [], [], trace.n_layer, trace.n_expert)
    for step in range(cut.n_steps):
        decoding = step >= trace.n_prompt
        ranks = k if decoding or prompt_k is None else prompt_k
        for layer in range(cut.n_layer):
            experts = cut.experts[step, layer, :ranks]
            if experts[0] < 0:
                continue
            result.needs.append(layer * trace.n_expert + experts.astype(np.int64))
            result.steps.append(step)
            result.layers.append(layer)
            result.counted.append(decoding)
    return result


class Policy(ABC):
    """Which resident expert goes first: the one with the smallest score."""

    def __init__(self, n_layer: int, n_expert: int) -> None:
        self.n_layer, self.n_expert = n_layer, n_expert
        self.last = np.full(n_layer * n_expert, -math.inf)

    @abstractmethod
    def touch(self, ids: Ids, step: int, layer: int) -> None:
        """``ids`` are used by ``layer`` in ``step``."""

    @abstractmethod
    def score(self, ids: Ids, step: int, layer: int) -> Scores:
        """How much each of ``ids`` is worth keeping while ``layer`` of ``step`` is computed."""

    def missed_visits(self, ids: Ids, step: int, layer: int) -> Scores:
        """How often the expert's own layer has been computed since the step that used it last, without it.

        Layers that the present step has yet to reach have had one visit less.
        """
        return step - np.floor(self.last[ids]) - (ids // self.n_expert > layer)


class LeastRecent(Policy):
    """Least recently used first."""

    def touch(self, ids: Ids, step: int, layer: int) -> None:
        self.last[ids] = step + layer / self.n_layer

    def score(self, ids: Ids, step: int, layer: int) -> Scores:
        return self.last[ids]


class MoEpic(Policy):
    """P = mu * rho^(nu / omega): mu activations so far, nu tokens since the last (arXiv 2509.08342)."""

    def __init__(self, n_layer: int, n_expert: int, rho: float = 0.25, omega: float = 128) -> None:
        super().__init__(n_layer, n_expert)
        self.mu = np.zeros(n_layer * n_expert)
        self.log_decay = math.log(rho) / omega

    def touch(self, ids: Ids, step: int, layer: int) -> None:
        self.mu[ids] += 1
        self.last[ids] = step + layer / self.n_layer

    def score(self, ids: Ids, step: int, layer: int) -> Scores:
        return np.log(self.mu[ids]) + (step - self.last[ids]) * self.log_decay


class Decay(MoEpic):
    """MoEpic's priority with a short memory, over visits of the expert's own layer: the engine's default."""

    def __init__(self, n_layer: int, n_expert: int, rho: float = 0.25, omega: float = 12) -> None:
        super().__init__(n_layer, n_expert, rho, omega)

    def touch(self, ids: Ids, step: int, layer: int) -> None:
        self.mu[ids] += 1
        self.last[ids] = step

    def score(self, ids: Ids, step: int, layer: int) -> Scores:
        return np.log(self.mu[ids]) + self.missed_visits(ids, step, layer) * self.log_decay


class TwoRate(Policy):
    """Two decaying use counts, a short memory and a long one, over visits of the expert's own layer.

    score = short_weight * sum(2^-(age/short)) + sum(2^-(age/long)) over the uses so far; ours. Both counts
    are updated at a use only, so an expert costs two numbers and a time stamp. Experts of layers that this
    step has yet to reach win ties: their next chance is nearest.
    """

    def __init__(
        self, n_layer: int, n_expert: int, short: float = 1, long: float = 16, short_weight: float = 3
    ) -> None:
        super().__init__(n_layer, n_expert)
        self.half_lives = np.array([short, long], dtype=float)
        self.weights = np.array([short_weight, 1.0])
        self.counts = np.zeros((n_layer * n_expert, 2))

    def touch(self, ids: Ids, step: int, layer: int) -> None:
        age = np.where(np.isfinite(self.last[ids]), step - self.last[ids], 0.0)
        self.counts[ids] = self.counts[ids] * 0.5 ** (age[:, None] / self.half_lives) + 1
        self.last[ids] = step

    def score(self, ids: Ids, step: int, layer: int) -> Scores:
        age = self.missed_visits(ids, step, layer)
        worth = (self.counts[ids] * 0.5 ** (age[:, None] / self.half_lives)) @ self.weights
        distance = (ids // self.n_expert - layer - 1) % self.n_layer
        return worth - 1e-9 * distance


PolicyFactory = Callable[[int, int], Policy]
POLICIES: dict[str, PolicyFactory] = {
    "lru": LeastRecent,
    "moepic": MoEpic,
    "decay": Decay,
    "two-rate": TwoRate,
}


def simulate(accessed: Accesses, capacity: int, policy: Policy) -> int:
    """Counted misses of an online policy. What one layer needs stays until the layer is computed, so the
    capacity must hold at least that; raises ValueError if it does not."""
    resident = np.zeros(accessed.n_layer * accessed.n_expert, dtype=bool)
    n_resident = n_misses = 0
    for need, step, layer, counted in zip(
        accessed.needs, accessed.steps, accessed.layers, accessed.counted, strict=True
    ):
        if len(need) > capacity:
            raise ValueError(f"a cache of {capacity} experts cannot hold the {len(need)} of one layer")
        missing = need[~resident[need]]
        n_misses += len(missing) if counted else 0
        excess = n_resident + len(missing) - capacity
        if excess > 0:
            pinned = resident.copy()
            pinned[need] = False
            candidates = np.flatnonzero(pinned)
            scores = policy.score(candidates, step, layer)
            resident[candidates[np.argsort(scores, kind="stable")[:excess]]] = False
            n_resident -= excess
        resident[missing] = True
        n_resident += len(missing)
        policy.touch(need, step, layer)
    return n_misses


def simulate_min(accessed: Accesses, capacity: int) -> int:
    """Counted misses of Belady's MIN with bypass: what is needed furthest in the future goes first, be it the
    expert just read. The bound for any policy that does not know the future (Belady 1966)."""
    sequence = [expert for need in accessed.needs for expert in need.tolist()]
    counted = [flag for need, flag in zip(accessed.needs, accessed.counted, strict=True) for _ in need]
    never = len(sequence)
    next_use, later = [never] * len(sequence), {}
    for index in range(len(sequence) - 1, -1, -1):
        next_use[index] = later.get(sequence[index], never)
        later[sequence[index]] = index
    resident: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    n_misses = 0
    for index, expert in enumerate(sequence):
        if expert not in resident:
            n_misses += counted[index]
        resident[expert] = next_use[index]
        heapq.heappush(furthest, (-next_use[index], expert))
        while len(resident) > capacity:
            distance, candidate = heapq.heappop(furthest)
            # entries of earlier uses are stale
            if resident.get(candidate) == -distance:
                del resident[candidate]
    return n_misses
