"""What a split reads: routing replayed through a cache that keeps and evicts segments as the store does.

Pure functions of routed ids; ``patches/src/store/mobile-split.h`` is the original. A layer's missing segments
are asked for together, what a layer needs stays until the next one asks, and the part with the smallest key
goes first, over all layers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import UsageError
from mobile_gguf.options.words import DEFAULT_EVICTION

Routes = npt.NDArray[np.int32]  # [n_tokens, n_layer, k], -1: no expert

# as the engine has them
REST_KEY = -1e9
QUOTA_TOKENS = 16.0
_STEP = {"lru": 1.0, "moepic": math.log(4) / 128, "decay": math.log(4) / 12}


@dataclass(frozen=True)
class Shape:
    """Layers, experts of each, and segments of an expert."""

    n_layer: int
    n_expert: int
    n_segments: int

    @property
    def n_parts(self) -> int:
        return self.n_layer * self.n_expert * self.n_segments


class _Cache:
    """Of each expert two units, what is kept of it and the rest, of which so many segments are there."""

    def __init__(
        self, shape: Shape, capacity: int, kept: Sequence[int], quota: Sequence[float], eviction: str
    ) -> None:
        self.shape, self.capacity, self.kept = shape, capacity, kept
        self.quota = np.array([q if q > 0 else np.inf for q in quota])
        self.wishes = np.isfinite(self.quota)
        self.is_lru, self.step = eviction == "lru", _STEP[eviction]
        self.unvisited = self.step if eviction == "decay" else 0.0
        n_units = 2 * shape.n_expert
        self.there = np.zeros((shape.n_layer, n_units), np.int64)
        self.keys = np.full((shape.n_layer, n_units), np.nan)  # nan: in use, or nothing of it is there
        self.uses = np.zeros((shape.n_layer, shape.n_expert), np.int64)
        self.heaps: list[list[tuple[float, int]]] = [[] for _ in range(shape.n_layer)]
        self.least = np.full(shape.n_layer, np.inf)
        self.held = np.zeros(shape.n_layer, np.int64)
        self.used = 0
        self.pinned: tuple[int, list[tuple[int, float]]] = (0, [])

    def ask(self, layer: int, experts: Sequence[int], time: int) -> int:
        """A layer's use of distinct experts; returns how many segments had to be read."""
        self._unpin()
        pinned, wanted = [], []
        for expert in experts:
            self.uses[layer, expert] += 1
            own = time * self.step + (0.0 if self.is_lru else math.log(self.uses[layer, expert]))
            for unit, size, key in (
                (2 * expert, self.kept[layer], own),
                (2 * expert + 1, self.shape.n_segments - self.kept[layer], own + REST_KEY),
            ):
                if size:
                    self.keys[layer, unit] = np.nan
                    pinned.append((unit, key))
                    wanted.append((unit, size - int(self.there[layer, unit])))
        self.pinned = (layer, pinned)
        self._settle(layer)
        missing = sum(n for _, n in wanted)
        self._make_room(layer, missing)
        for unit, n in wanted:
            self.there[layer, unit] += n
        self.held[layer] += missing
        self.used += missing
        return missing

    def _unpin(self) -> None:
        layer, pinned = self.pinned
        for unit, key in pinned:
            self.keys[layer, unit] = key
            heapq.heappush(self.heaps[layer], (key, unit))
        self._settle(layer)

    def _settle(self, layer: int) -> None:
        """Forget what stands in the layer's heap and is no longer so."""
        heap = self.heaps[layer]
        while heap and (self.keys[layer, heap[0][1]] != heap[0][0] or not self.there[layer, heap[0][1]]):
            heapq.heappop(heap)
        self.least[layer] = heap[0][0] if heap else np.inf

    def _make_room(self, layer: int, n: int) -> None:
        while self.used + n > self.capacity:
            fullness = np.where(self.wishes, np.minimum(self.held / self.quota - 1.0, 1.0), 0.0)
            scores = self.least - QUOTA_TOKENS * self.step * fullness
            scores[layer + 1 :] += self.unvisited
            victim = int(np.argmin(scores))
            if not np.isfinite(scores[victim]):
                raise UsageError("the budget is too small for the experts that a token uses in one layer")
            unit = self.heaps[victim][0][1]
            gone = min(int(self.there[victim, unit]), self.used + n - self.capacity)
            self.there[victim, unit] -= gone
            self.held[victim] -= gone
            self.used -= gone
            if not self.there[victim, unit]:
                self.keys[victim, unit] = np.nan
                self._settle(victim)


def missing_segments(
    routes: Routes,
    shape: Shape,
    capacity: int,
    kept: Sequence[int],
    shares: Sequence[float],
    *,
    eviction: str = DEFAULT_EVICTION,
) -> npt.NDArray[np.int64]:
    """Segments that each token reads in each layer, [n_tokens, n_layer], from an empty cache of ``capacity``.

    ``kept`` and ``shares`` of each layer as in ``mobile_gguf/engine/split.py``. Raises UsageError if it
    cannot hold what a token uses in one layer.
    """
    cache = _Cache(shape, capacity, kept, [share * capacity for share in shares], eviction)
    found = np.zeros(routes.shape[:2], np.int64)
    for time, token in enumerate(routes.tolist()):
        for layer, experts in enumerate(token):
            distinct = sorted({expert for expert in experts if expert >= 0})
            if distinct:
                found[time, layer] = cache.ask(layer, distinct, time)
    return found
