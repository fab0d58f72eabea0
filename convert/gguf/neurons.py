"""Moving an expert's neurons without touching a weight bit: rows of gate and up, columns of down.

An expert's matrices come as one piece, or as several of equal width (segments); a neuron's place counts
through the pieces in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .data import CHUNK, Data, FileRange

# Neurons' places, made when they are needed: those of all experts at once would take much memory.
Places = Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Joined:
    """The bytes of several pieces, one after the other."""

    pieces: tuple[Data, ...]

    @property
    def n_bytes(self) -> int:
        return sum(piece.n_bytes for piece in self.pieces)

    def chunks(self) -> Iterator[bytes | memoryview]:
        for piece in self.pieces:
            yield from piece.chunks()


@dataclass(frozen=True, slots=True)
class Computed:
    """An array that is made when it is written."""

    n_bytes: int
    array: Callable[[], np.ndarray]

    def chunks(self) -> Iterator[memoryview]:
        yield np.ascontiguousarray(self.array()).data.cast("B")


@dataclass(frozen=True, slots=True)
class Rows:
    """Chosen neurons of a matrix that has a row for each; ``halves`` is 2 where gate and up stand in one.

    ``places`` gives int [n_places]: the neurons' places in the pieces, in the order to write. One half of the
    result is held in memory.
    """

    pieces: tuple[FileRange, ...]
    row_bytes: int
    n_places: int
    places: Places
    halves: int = 1

    @property
    def n_bytes(self) -> int:
        return self.n_places * self.row_bytes * self.halves

    def chunks(self) -> Iterator[memoryview]:
        width = self.pieces[0].n_bytes // (self.row_bytes * self.halves)
        places = self.places()
        for half in range(self.halves):
            rows = np.empty((self.n_places, self.row_bytes), np.uint8)
            for number, piece in enumerate(self.pieces):
                (wanted,) = np.nonzero(places // width == number)
                if wanted.size:
                    own = piece.slice(half * width * self.row_bytes, width * self.row_bytes)
                    _copy_rows(own, self.row_bytes, places[wanted] % width, rows, wanted)
            yield rows.data.cast("B")
        check_unchanged(self.pieces)


@dataclass(frozen=True, slots=True)
class Columns:
    """Chosen neurons of a matrix that has a column for each, in whole blocks of its type.

    ``places`` as for ``Rows``; ``block`` is (neurons, bytes) of a block, a row of a piece is its blocks.
    """

    pieces: tuple[FileRange, ...]
    n_rows: int
    block: tuple[int, int]
    n_places: int
    places: Places

    @property
    def n_bytes(self) -> int:
        return self.n_rows * (self.n_places // self.block[0]) * self.block[1]

    def chunks(self) -> Iterator[memoryview]:
        n_neurons, block_bytes = self.block
        chosen = self.places()[::n_neurons] // n_neurons
        row_bytes = self.pieces[0].n_bytes // self.n_rows
        step = max(1, CHUNK // (row_bytes * len(self.pieces)))
        for start in range(0, self.n_rows, step):
            n_rows = min(step, self.n_rows - start)
            ranges = [piece.slice(start * row_bytes, n_rows * row_bytes) for piece in self.pieces]
            parts = [_read(part).reshape(n_rows, -1, block_bytes) for part in ranges]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            yield np.ascontiguousarray(rows[:, chosen]).data.cast("B")
        check_unchanged(self.pieces)


def check_unchanged(pieces: Sequence[FileRange]) -> None:
    """Raise ModelFormatError if a file was changed since it was opened."""
    for part in {id(piece.part): piece.part for piece in pieces}.values():
        part.check_unchanged()


def importance_order(importance: np.ndarray, block: int) -> np.ndarray:
    """The order of neurons, the most important first; int32 of the shape of ``importance`` [n_expert, n_ff].

    Neurons of a block of the down matrix's type stay together: blocks go by their mean importance, of equal
    ones the first goes first.
    """
    n_expert, n_ff = importance.shape
    by_block = importance.reshape(n_expert, n_ff // block, block)
    blocks = np.argsort(-by_block.mean(axis=2, dtype=np.float64), axis=1, kind="stable")
    return (blocks[:, :, None] * block + np.arange(block)).reshape(n_expert, n_ff).astype(np.int32)


def are_whole_blocks(places: np.ndarray, block: int) -> bool:
    """Whether places [n_expert, n_ff] keep blocks of neurons together and in order."""
    by_block = places.reshape(-1, block)
    first = by_block[:, :1]
    return not (first % block).any() and np.array_equal(by_block, first + np.arange(block))


def legal_segments(widths: Sequence[tuple[int, int]], most: int) -> list[int]:
    """The numbers of segments that (n_ff, neurons of a block) of every layer allow."""
    return [s for s in range(1, most + 1) if all(n % s == 0 and n // s % block == 0 for n, block in widths)]


def inverse(order: np.ndarray) -> np.ndarray:
    """Where each neuron stands, given which stands at each place; [n_expert, n_ff]."""
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(order.shape[1], dtype=order.dtype)[None], axis=1)
    return places


def _copy_rows(
    source: FileRange, row_bytes: int, rows: np.ndarray, into: np.ndarray, places: np.ndarray
) -> None:
    """Copy ``rows`` of ``source`` to ``places`` of ``into``, reading the source once in order."""
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    step = max(1, CHUNK // row_bytes)
    for start in range(int(rows[0]), int(rows[-1]) + 1, step):
        first, last = np.searchsorted(rows, [start, start + step])
        if first < last:
            count = int(rows[last - 1]) + 1 - start
            data = _read(source.slice(start * row_bytes, count * row_bytes)).reshape(count, row_bytes)
            into[places[first:last]] = data[rows[first:last] - start]


def _read(data: FileRange) -> np.ndarray:
    raw = np.empty(data.n_bytes, np.uint8)
    data.part.read_into(raw.data, data.offset)
    return raw
