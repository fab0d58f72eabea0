"""What a model computes with while it runs: routed experts, and squares of its weights' inputs.

Python's side of ``mobile_observe_*`` in ``patches/src/mobile.h``. Watching costs time, never changes outputs;
a context that is not observed pays nothing.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .binding import Engine
from .structs import OBSERVE, ObservedInputStruct, ObservedRouteStruct

ROUTES, NEURONS, INPUTS = OBSERVE["routes"], OBSERVE["neurons"], OBSERVE["inputs"]


@dataclass(frozen=True)
class InputSums:
    """Squares of what a weight was multiplied with, summed over rows: llama.cpp's imatrix entry.

    ``sum2`` [n_mat, n_row] by matrix (expert) and input neuron. ``counts`` are the rows that were summed:
    [n_mat] for experts, [1] for other weights, whose matrices all see as many.
    """

    sum2: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]

    def mean(self) -> npt.NDArray[np.float32]:
        """Mean square by matrix and neuron, [n_mat, n_row]; zero where nothing was seen."""
        return (self.sum2 / np.maximum(self.counts, 1)[:, None]).astype(np.float32)


@dataclass(frozen=True)
class ObservedRoute:
    """One layer's routing in one micro-batch: ``ids`` (-1: skipped) and ``weights`` [n_tokens, n_used].

    Of the last layer only tokens with an output.
    """

    layer: int
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


class Observation:
    """Watches a context while entered; ``what`` is a sum of ROUTES, NEURONS and INPUTS.

    ``ctx`` is the address that llama-cpp-python holds, and must outlive it. Raises EngineError if the context
    is watched already, or if something could not be observed.
    """

    def __init__(self, engine: Engine, ctx: int, what: int) -> None:
        self._engine = engine
        self._ctx = ctx
        self._what = what

    def __enter__(self) -> Observation:
        self._engine.checked("observe_start", "observing", self._ctx, self._what)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._engine.checked("observe_stop", "ending the observation", self._ctx)

    def inputs(self) -> dict[str, InputSums]:
        """Sums over all inputs since the start, by the weight's name in the stacked file."""
        observed, item = {}, ObservedInputStruct()
        for i in range(self._count("observe_n_inputs")):
            self._engine.checked("observe_get_input", "reading the inputs", self._ctx, i, ctypes.byref(item))
            sum2 = np.ctypeslib.as_array(item.sum2, (item.n_mat, item.n_row)).copy()
            counts = np.ctypeslib.as_array(item.counts, (item.n_count,)).copy()
            observed[item.name.decode("utf-8", errors="replace")] = InputSums(sum2, counts)
        return observed

    def take_routes(self) -> list[ObservedRoute]:
        """Routing since the last call (or the start), in the order of computation."""
        observed, item = [], ObservedRouteStruct()
        for i in range(self._count("observe_n_routes")):
            self._engine.checked("observe_get_route", "reading the routes", self._ctx, i, ctypes.byref(item))
            shape = (item.n_tokens, item.n_used)
            ids = np.ctypeslib.as_array(item.ids, shape).copy()
            weights = np.ctypeslib.as_array(item.weights, shape).copy()
            observed.append(ObservedRoute(item.layer, ids, weights))
        self._engine.checked("observe_clear_routes", "reading the routes", self._ctx)
        return observed

    def _count(self, name: str) -> int:
        return self._engine.checked(name, "reading what was observed", self._ctx)
