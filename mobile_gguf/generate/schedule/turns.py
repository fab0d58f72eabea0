"""What the next decode is of: the wishes of several answers that go together, and how many tokens of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mobile_gguf.errors import EngineError

from ..context.wish import Wish
from .room import Room


class Sizes(Protocol):
    """A context's largest decode, and what it computes at once; Native is the real one."""

    n_batch: int

    @property
    def n_ubatch(self) -> int: ...


class Turns:
    """Chooses among wishes those that have waited longest, as long as ``room`` has cells for them.

    ``in_turn``: every decode is of one sequence.
    """

    def __init__(self, room: Room, sizes: Sizes, *, in_turn: bool) -> None:
        self._room = room
        self._sizes = sizes
        self._in_turn = in_turn

    def choose(self, waiting: Sequence[Wish]) -> list[tuple[Wish, int]]:
        """Wishes, and how many tokens of each, prompts first. Raises EngineError where none has room."""
        sizes = self._sizes
        n_single = sum(len(wish.tokens) for wish in waiting if not wish.is_long)
        left = max(1, min(sizes.n_batch, sizes.n_ubatch) - n_single)
        # of drafts in several micro-batches the engine could not take back what was refused
        has_drafts = any(wish.is_drafted for wish in waiting)
        room = min(sizes.n_batch, sizes.n_ubatch) if has_drafts else sizes.n_batch
        chosen: list[tuple[Wish, int]] = []
        for wish in sorted(waiting, key=lambda one: (one.sequence.served_at, one.sequence.number)):
            if not room or (self._in_turn and chosen):
                break
            if not all(wish.goes_with(other) for other, _ in chosen):
                continue
            if (wish.is_long and not left) or not self._claim(wish):
                continue
            n = wish.n_before or len(wish.tokens)
            if wish.is_long and not (self._in_turn or len(waiting) == 1):
                n = min(n, left)
                left -= n
            n = min(n, room)
            room -= n
            chosen.append((wish, n))
        if waiting and not chosen:
            raise EngineError("the context has no room for any of the answers")
        # what comes last counts as used last, and a prompt uses nearly all experts
        return sorted(chosen, key=lambda one: (not one[0].is_long, one[0].sequence.number))

    def _claim(self, wish: Wish) -> bool:
        """Have cells for a wish, and all of its text here; False: it has to wait."""
        # who begins, or gave way, waits until all of it has room, or it would only take from others
        sequence = wish.sequence
        if not self._room.claim(sequence, len(sequence.away) + wish.n_before + wish.n_left):
            return False
        if sequence.away:
            before = sequence.come_back(sequence.policy.always_big)
            wish.tokens[:0] = before
            wish.n_before += len(before)
        return True
