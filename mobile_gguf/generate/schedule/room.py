"""Which sequence a new answer is made in, and who leaves the cells of a context that all share.

Texts that no answer is made in stay until others need their cells, the one that was left longest ago goes
first. Then the youngest answers give way to older ones: they are put away and come back when there is room.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from ..context.cells import Cells
from ..sessions.prefix_cache import LEAST_TOKENS

Seat = TypeVar("Seat", bound=Cells)


class Room:
    """``n_cells`` of a context for the tokens of ``sequences``; of each, unless ``is_shared``."""

    def __init__(self, sequences: Sequence[Cells], n_cells: int, *, is_shared: bool) -> None:
        self._sequences = sequences
        self._n_cells = n_cells
        self._is_shared = is_shared and len(sequences) > 1
        self._clock = 0
        self._waiting: list[Cells] = []
        self._claimed: dict[int, int] = {}  # tokens that there will be of a sequence, by its number

    def seat(self, sequences: Sequence[Seat], prompt: Sequence[int], only_big: bool) -> Seat:
        """Take the sequence that has most of ``prompt``, else an empty one, else the one left longest ago."""

        def worth(one: Seat) -> tuple[int, bool, int]:
            n = one.n_usable(prompt, only_big)
            # another can share what this one has, and this one keeps the rest of it
            is_better = one.can_be_copied and n <= len(one.tokens) - LEAST_TOKENS
            return 0 if n < LEAST_TOKENS or is_better else n, not one.tokens, -one.used_at

        best = max((one for one in sequences if not one.is_taken), key=worth)
        self._clock += 1
        best.is_taken, best.used_at = True, self._clock
        return best

    def leave(self, sequence: Cells) -> None:
        """An answer has ended: its text stays for the next one."""
        self._clock += 1
        sequence.is_taken, sequence.used_at = False, self._clock
        sequence.away = []
        if self._is_shared:
            sequence.cut()  # what a decode that failed has left

    @contextlib.contextmanager
    def claims(self, waiting: Sequence[Cells]) -> Iterator[None]:
        """Claims for one decode are made meanwhile; those who wait for it may have to give way."""
        self._waiting = list(waiting)
        try:
            yield
        finally:
            self._waiting, self._claimed = [], {}

    def claim(self, sequence: Cells, n: int, at_once: bool = False) -> bool:
        """Have cells for ``n`` more tokens of a sequence; False: it has to wait.

        Texts that nobody goes on with leave for it, then those that are younger, ``at_once`` all that wait.
        """
        if not self._is_shared:
            return True
        n_all = len(sequence.tokens) + n
        while self._n_others(sequence) + n_all > self._n_cells:
            going = self._idle(sequence) or self._younger(sequence, at_once)
            if going is None:
                return False
            going.give_way()
        if self._waiting:
            self._claimed[sequence.number] = max(n_all, self._claimed.get(sequence.number, 0))
        return True

    def has_cells(self, n: float) -> bool:
        """Whether so many tokens of several texts are in the context at once."""
        return not self._is_shared or n <= self._n_cells

    def _n_others(self, sequence: Cells) -> int:
        others = [one for one in self._sequences if one is not sequence]
        return sum(max(len(one.tokens), self._claimed.get(one.number, 0)) for one in others)

    def _idle(self, sequence: Cells) -> Cells | None:
        idle = [one for one in self._sequences if not one.is_taken and one.tokens and one is not sequence]
        return min(idle, key=lambda one: one.used_at, default=None)

    def _younger(self, sequence: Cells, at_once: bool) -> Cells | None:
        younger = [
            one
            for one in self._waiting
            if (at_once or one.used_at > sequence.used_at)
            and one.tokens
            and one is not sequence
            and one.number not in self._claimed
        ]
        return max(younger, key=lambda one: one.used_at, default=None)
