"""Experts cut into segments of neurons: which numbers are possible, which neuron goes where, the pieces."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.experts import DOWN, GATE_UP, MAX_EXPERTS

from ..options import MAX_SEGMENTS
from .data import Data, FileRange, TensorPlan
from .experts import Experts, Stack, stored_order
from .file import GgufSource
from .neurons import (
    Columns,
    Computed,
    Joined,
    Rows,
    are_whole_blocks,
    importance_order,
    inverse,
    legal_segments,
)

_I32 = 26


def check_segments(source: GgufSource, experts: Experts, segments: int) -> None:
    """Raise UsageError if the experts cannot be cut into so many."""
    path = source.path
    most = max(stack.n_expert for stack in experts.stacks) * segments
    if most > MAX_EXPERTS:
        raise UsageError(
            f"{path} cannot be cut into {segments} segments: {most} pieces in a layer are more than the"
            f" {MAX_EXPERTS} that the engine takes"
        )
    if segments == 1:
        return
    if experts.beside:
        raise UsageError(
            f"{path} cannot be cut into segments: its experts have biases or scales ({experts.beside[0]});"
            " leave --segments out"
        )
    widths = [
        (stack.width * stack.segments, stack.block[0]) for stack in experts.stacks if stack.kind == DOWN
    ]
    legal = legal_segments(widths, MAX_SEGMENTS)
    if segments not in legal:
        n_ff, block = next(w for w in widths if segments not in legal_segments([w], MAX_SEGMENTS))
        possible = ", ".join(map(str, legal[1:])) or "none"
        raise UsageError(
            f"{path} cannot be cut into {segments} segments: its experts have {n_ff} neurons, in blocks of"
            f" {block} in the down matrix; possible numbers of segments: {possible}"
        )


class Neurons:
    """Where each layer's neurons stand in ``source``, and where they are to stand.

    ``by_importance``: the most important of an expert first; otherwise as in the stacked file. Arrays are
    int32 [n_expert, n_ff]; only the last layer's are kept. Raises UsageError if the file has no importance,
    ModelFormatError if what it says about neurons is wrong.
    """

    def __init__(self, source: GgufSource, experts: Experts, *, by_importance: bool = False) -> None:
        self._source = source
        self._downs = {stack.layer: stack for stack in experts.stacks if stack.kind == DOWN}
        self._by_importance = by_importance
        self._places = functools.lru_cache(maxsize=1)(self._make_places)
        self.order = functools.lru_cache(maxsize=1)(self._make_order)
        for layer, down in self._downs.items():
            places = self._places(layer)
            if places is not None and not are_whole_blocks(places, down.block[0]):
                raise ModelFormatError(
                    f"{source.path} cannot be used: tensor {keys.SEGMENT_ORDER_TENSOR}{layer} cuts through"
                    f" blocks of {down.block[0]} neurons"
                )

    def order_tensors(self) -> Iterator[TensorPlan]:
        """The tensors that say which neuron of the stacked file stands at each place."""
        for layer, down in self._downs.items():
            n_ff = down.width * down.segments
            array = functools.partial(self._stored, layer)
            data = Computed(4 * n_ff * down.n_expert, array)
            yield TensorPlan(f"{keys.SEGMENT_ORDER_TENSOR}{layer}", (n_ff, down.n_expert), _I32, data)

    def pieces(self, stack: Stack, segments: int) -> Iterator[Data]:
        """The bytes of one matrix of every expert of a layer, each cut into ``segments``."""
        moved = self._by_importance or (
            self._source.tensor(f"{keys.SEGMENT_ORDER_TENSOR}{stack.layer}") is not None
            and stack.segments > 1
        )
        if stack.segments == segments and not moved:
            yield from stack.pieces
            return
        n_places = stack.width * stack.segments // segments
        for expert in range(stack.n_expert):
            own = stack.pieces[expert * stack.segments : (expert + 1) * stack.segments]
            for start in range(0, n_places * segments, n_places):
                yield _moved(stack, own, n_places, _Span(self, stack.layer, expert, start, n_places))

    def _make_order(self, layer: int) -> np.ndarray | None:
        """Which neuron of the stacked file is to stand at each place; None: the one it has there."""
        if not self._by_importance:
            return None
        down = self._downs[layer]
        name, path = f"{keys.IMPORTANCE}{layer}", self._source.path
        tensor = self._source.tensor(name)
        if tensor is None:
            raise UsageError(
                f"{path} does not say which neurons are important ({name} is missing): run"
                f" `mobile-gguf calibrate {path}` first, or give --segment-order natural"
            )
        shape = (down.width * down.segments, down.n_expert)
        if tensor.shape != shape:
            raise ModelFormatError(f"{path} cannot be used: tensor {name} is {tensor.shape}, not {shape}")
        values = self._source.array(name)
        if not np.isfinite(values).all():
            raise ModelFormatError(f"{path} cannot be used: tensor {name} holds values that are no numbers")
        return importance_order(values, down.block[0])

    def _make_places(self, layer: int) -> np.ndarray | None:
        """Where in the source the neuron for each place stands; None: at that place."""
        stands = stored_order(self._source, self._downs[layer])
        order = self.order(layer)
        if stands is None:
            return order
        return inverse(stands) if order is None else np.take_along_axis(inverse(stands), order, axis=1)

    def chosen(self, layer: int, expert: int, start: int, n_places: int) -> np.ndarray:
        """Where the neurons for these places of an expert stand in the source."""
        places = self._places(layer)
        if places is None:
            return np.arange(start, start + n_places)
        return places[expert, start : start + n_places]

    def _stored(self, layer: int) -> np.ndarray:
        order = self.order(layer)
        if order is None:
            down = self._downs[layer]
            n_ff = down.width * down.segments
            order = np.broadcast_to(np.arange(n_ff, dtype=np.int32), (down.n_expert, n_ff))
        return order.astype("<i4", copy=False)


@dataclass(frozen=True, slots=True)
class _Span:
    """Where the neurons of one piece stand, asked for when it is written: there may be 100,000s of pieces."""

    neurons: Neurons
    layer: int
    expert: int
    start: int
    n_places: int

    def __call__(self) -> np.ndarray:
        return self.neurons.chosen(self.layer, self.expert, self.start, self.n_places)


def joined(pieces: Iterable[Data]) -> Data:
    """The bytes of all pieces; those that follow each other in a file are one range."""
    runs: list[Data] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        if (
            isinstance(piece, FileRange)
            and isinstance(last, FileRange)
            and last.part is piece.part
            and last.offset + last.n_bytes == piece.offset
        ):
            runs[-1] = FileRange(last.part, last.offset, last.n_bytes + piece.n_bytes)
        else:
            runs.append(piece)
    return runs[0] if len(runs) == 1 else Joined(tuple(runs))


def _moved(stack: Stack, own: tuple[FileRange, ...], n_places: int, places: _Span) -> Data:
    n_in, n_out = stack.shape
    if stack.kind == DOWN:
        return Columns(own, n_out, stack.block, n_places, places)
    elements, block_bytes = stack.block
    halves = 2 if stack.kind == GATE_UP else 1
    return Rows(own, n_in // elements * block_bytes, n_places, places, halves)
