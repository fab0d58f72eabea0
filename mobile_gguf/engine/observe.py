"""What a model computes with while it runs: routed experts, and squares of its weights' inputs.

Python's side of ``mobile_observe_*`` in ``patches/src/mobile.h``. Watching costs time, never changes outputs;
a context that is not observed pays nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .binding import Engine
from .structs import OBSERVE, ObservedInputStruct, ObservedLittleStruct, ObservedRouteStruct

ROUTES, NEURONS, INPUTS, LITTLE = (OBSERVE[what] for what in ("routes", "neurons", "inputs", "little"))


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


@dataclass(frozen=True)
class LittleSums:
    """Of a layer's sum of routed experts over ``n_tokens``, by channel [n_embd]: all experts, and fewer.

    ``big`` and ``little`` are sums, ``big2`` and ``little2`` sums of squares; ``way`` is which of those that
    were asked for.
    """

    layer: int
    way: int
    n_tokens: int
    big: npt.NDArray[np.float64]
    big2: npt.NDArray[np.float64]
    little: npt.NDArray[np.float64]
    little2: npt.NDArray[np.float64]


class Observation:
    """Watches a context while entered; ``what`` is a sum of ROUTES, NEURONS, INPUTS and LITTLE.

    ``ways``, for LITTLE, are numbers of experts, and masses that their weights are divided by (0: their own).
    ``ctx`` is the address that llama-cpp-python holds, and must outlive it. Raises EngineError if the context
    is watched already, or if something could not be observed.
    """

    def __init__(self, engine: Engine, ctx: int, what: int, ways: Sequence[tuple[int, int]] = ()) -> None:
        self._engine = engine
        self._ctx = ctx
        self._what = what
        self._ways = list(ways)

    def __enter__(self) -> Observation:
        self._engine.checked("observe_start", "observing", self._ctx, self._what)
        if self._what & LITTLE:
            try:
                self._ask_little()
            except BaseException:
                self._engine.checked("observe_stop", "ending the observation", self._ctx)
                raise
        return self

    def _ask_little(self) -> None:
        n = len(self._ways)
        counts, masses = ((ctypes.c_int32 * n)(*(way[i] for way in self._ways)) for i in (0, 1))
        self._engine.checked("observe_set_little", "observing little tokens", self._ctx, counts, masses, n)

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

    def little(self) -> list[LittleSums]:
        """Sums over all tokens since the start, by layer and way."""
        observed, item = [], ObservedLittleStruct()
        for i in range(self._count("observe_n_little")):
            self._engine.checked("observe_get_little", "reading sums", self._ctx, i, ctypes.byref(item))
            arrays = [
                np.ctypeslib.as_array(pointer, (item.n_embd,)).copy()
                for pointer in (item.big, item.big2, item.little, item.little2)
            ]
            observed.append(LittleSums(item.layer, item.way, item.n_tokens, *arrays))
        return observed

    def _count(self, name: str) -> int:
        return self._engine.checked(name, "reading what was observed", self._ctx)
