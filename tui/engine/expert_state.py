"""What the expert map shows: where every expert is and what was just asked of it.

Pure arithmetic over arrays [layers, n_expert], so that it can be tested without a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.experts import Asked, Places
from mobile_gguf.engine.structs import LOADING as STORE_LOADING
from mobile_gguf.engine.structs import RESIDENT

# For how many tokens a hit or a miss stays visible; the first of them is the brightest.
GLOW_TOKENS = 4


class Cell(IntEnum):
    """What a cell of the map says; of several experts in a cell the largest event wins."""

    ABSENT = 0  # in the file only
    HOST = 1
    DEVICE = 2
    OLD_HIT = 3
    OLD_MISS = 4
    HIT = 5
    DEVICE_HIT = 6
    LOADING = 7
    MISS = 8


_FIRST_EVENT = Cell.OLD_HIT


class ExpertState:
    """The last known residency of all experts, and the events of the last tokens."""

    def __init__(self, layers: Sequence[int], n_expert: int, expert_bytes: Sequence[int] = ()) -> None:
        """``layers`` are numbers of those with experts, a row each; ``expert_bytes`` of one in each."""
        shape = (len(layers), n_expert)
        self.expert_bytes = list(expert_bytes)
        self.layers = list(layers)
        self.host: npt.NDArray[np.uint8] = np.zeros(shape, dtype=np.uint8)
        self.device: npt.NDArray[np.uint8] | None = None
        self.hits: npt.NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self.misses: npt.NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self.n_lost = 0  # uses that were not counted
        self.token = 0
        self._hit_at = np.full(shape, -GLOW_TOKENS, dtype=np.int64)
        self._miss_at = np.full(shape, -GLOW_TOKENS, dtype=np.int64)

    def set_places(self, places: Places) -> None:
        """Take a new picture of where the experts are."""
        self.host = places.host
        self.device = places.device

    def next_token(self, asked: Asked) -> None:
        """Count the experts of one more token."""
        self.token += 1
        self.n_lost += asked.n_lost
        for at, counts, which in (
            (self._hit_at, self.hits, ~asked.missed),
            (self._miss_at, self.misses, asked.missed),
        ):
            where = asked.rows[which], asked.experts[which]
            at[where] = self.token
            np.add.at(counts, where, 1)

    def settle(self) -> None:
        """Let the glow of all events end, as when an answer is over."""
        self.token += GLOW_TOKENS

    def cells(self) -> npt.NDArray[np.uint8]:
        """A Cell for each expert, [layers, n_expert]."""
        cells = np.where(self.host == RESIDENT, Cell.HOST, Cell.ABSENT).astype(np.uint8)
        on_device = self.device == RESIDENT if self.device is not None else np.zeros_like(cells, dtype=bool)
        cells[on_device] = Cell.DEVICE
        miss_age, hit_age = self.token - self._miss_at, self.token - self._hit_at
        cells[hit_age < GLOW_TOKENS] = Cell.OLD_HIT
        cells[(miss_age < GLOW_TOKENS) & (miss_age <= hit_age)] = Cell.OLD_MISS
        cells[hit_age == 0] = Cell.HIT
        cells[(hit_age == 0) & on_device] = Cell.DEVICE_HIT
        cells[self.host == STORE_LOADING] = Cell.LOADING
        if self.device is not None:
            cells[self.device == STORE_LOADING] = Cell.LOADING
        cells[miss_age == 0] = Cell.MISS
        return cells

    def counts(self) -> dict[str, int]:
        """How many experts are on the device, on the host, and being loaded; bytes of those on the host."""
        on_device = int((self.device == RESIDENT).sum()) if self.device is not None else 0
        loading = int((self.host == STORE_LOADING).sum())
        by_layer = (self.host == RESIDENT).sum(axis=1).tolist()
        n_bytes = sum(n * each for n, each in zip(by_layer, self.expert_bytes, strict=False))
        return {"device": on_device, "host": sum(by_layer), "loading": loading, "bytes": n_bytes}


def spans(n: int, room: int) -> list[range]:
    """``n`` things in order in at most ``room`` cells, as evenly as they go."""
    cells = min(n, max(1, room))
    return [range(i * n // cells, (i + 1) * n // cells) for i in range(cells)]


def aggregate(cells: npt.NDArray[np.uint8], rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Shrink ``cells`` to at most ``rows`` x ``columns``.

    Where several experts share a cell, the largest event among them is shown; without one, where half of
    them or more are.
    """
    bands, stripes = spans(cells.shape[0], rows), spans(cells.shape[1], columns)
    out = np.zeros((len(bands), len(stripes)), dtype=np.uint8)
    for row, band in enumerate(bands):
        for column, stripe in enumerate(stripes):
            out[row, column] = _summary(cells[band.start : band.stop, stripe.start : stripe.stop])
    return out


def _summary(group: npt.NDArray[np.uint8]) -> int:
    largest = int(group.max())
    if group.size == 1 or largest >= _FIRST_EVENT:
        return largest
    if 2 * int((group == Cell.DEVICE).sum()) >= group.size:
        return int(Cell.DEVICE)
    resident = int((group != Cell.ABSENT).sum())
    return int(Cell.HOST) if 2 * resident >= group.size else int(Cell.ABSENT)
