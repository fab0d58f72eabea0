"""Conversations that another one has put out of the context, kept in memory until one of them goes on.

Pure: what is kept is bytes that somebody else makes and takes. A text that comes continues the one here with
which it has most in common. What leaves this cache, or would end with it, may have a place on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .session_files import Saved

# What has fewer tokens of its own is computed sooner than it is moved.
LEAST_TOKENS = 32


def common_length(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common from the start."""
    n = min(len(some), len(others))
    return next((i for i in range(n) if some[i] != others[i]), n)


@dataclass(frozen=True)
class Checkpoint:
    """What a memory that cannot be rolled back held after ``n_tokens``."""

    n_tokens: int
    state: Any = field(repr=False)  # an array of bytes

    @property
    def n_bytes(self) -> int:
        return int(self.state.nbytes)


@dataclass
class Kept:
    """A text's tokens, the first ``n_big`` of them by big passes, and the state that they left.

    ``checkpoints`` are of the same text, the shortest first; None where the memory needs none, since any part
    at the end of a text can be dropped.
    """

    tokens: list[int]
    n_big: int
    state: Any = field(repr=False)
    checkpoints: list[Checkpoint] | None = None
    used_at: int = 0
    is_saved: bool = False  # on disk, too

    @property
    def n_bytes(self) -> int:
        return int(self.state.nbytes) + sum(one.n_bytes for one in self.checkpoints or ())


def usable(
    tokens: Sequence[int], n_good: int, checkpoints: Sequence[Checkpoint] | None, prompt: Sequence[int]
) -> int:
    """How many tokens of ``prompt`` need not be computed after a text of which ``n_good`` may be built on.

    The last one always has to: its logits are wanted.
    """
    n = min(common_length(tokens, prompt), n_good, len(prompt) - 1)
    if checkpoints is None or n == len(tokens):
        return n
    return max((one.n_tokens for one in checkpoints if one.n_tokens <= n), default=0)


class Disk(Protocol):
    """Where texts are that outlive this process; Sessions is the real one."""

    least_tokens: int  # shorter texts are not taken

    @property
    def is_open(self) -> bool: ...  # whether it takes texts
    def best(self, prompt: Sequence[int], only_big: bool) -> tuple[Saved | None, int]: ...
    def take(self, saved: Saved) -> Kept | None: ...
    def left(self, kept: Kept) -> None: ...  # it waits in memory
    def gone_on(self, kept: Kept) -> None: ...  # it does no more, and another text has all of it
    def evicted(self, kept: Kept) -> None: ...  # it does no more
    def flush(self) -> None: ...  # write all that was left
    def close(self) -> None: ...


class PrefixCache:
    """Texts that were put away, within ``limit_bytes`` and ``room_bytes(kept)``, asked before each is taken.

    ``kept`` are the bytes that are kept already: here, and ``beside``, which others keep in the same limits.

    The least worthy goes first: the one with the fewest tokens, the longer nobody wanted it the fewer. Where
    there is a ``disk``, it goes there.
    """

    def __init__(self, limit_bytes: int, room_bytes: Callable[[int], int], disk: Disk | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.disk = disk
        self._room_bytes = room_bytes
        self._kept: list[Kept] = []
        self._clock = 0

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def has_room(self, n_bytes: int, beside: int = 0) -> bool:
        """Whether so many bytes more fit beside what is kept."""
        kept = self.n_bytes + beside
        return n_bytes <= min(self.limit_bytes - kept, self._room_bytes(kept))

    def make_room(self, tokens: Sequence[int], n_bytes: int, beside: int = 0) -> bool:
        """Whether a state of so many bytes may be made of a text; what has to go for it is dropped.

        What the text contains goes in any case, and nothing that is worth more than it.
        """
        self._clock += 1
        n_tokens = len(tokens)
        for one in list(self._kept):
            if common_length(one.tokens, tokens) == len(one.tokens):
                self._kept.remove(one)
                if self.disk is not None:
                    self.disk.gone_on(one)
        room = self._room_bytes(self.n_bytes + beside)
        limit = min(self.limit_bytes - beside, self.n_bytes + room)
        going: list[Kept] = []
        left = self.n_bytes
        for one in sorted(self._kept, key=self._worth):
            if left + n_bytes <= limit:
                break
            if self._worth(one) > n_tokens:
                return False
            going.append(one)
            left -= one.n_bytes
        if left + n_bytes > limit:
            return False
        for one in going:
            self._kept.remove(one)
            if self.disk is not None:
                self.disk.evicted(one)
        return True

    def may_pass(self, n_tokens: int, n_bytes: int, beside: int = 0) -> bool:
        """Whether a state that has no room here may be made of a text for the disk, and dropped then."""
        if self.disk is None or n_tokens < self.disk.least_tokens:
            return False
        return n_bytes <= self._room_bytes(self.n_bytes + beside)

    def _worth(self, one: Kept) -> float:
        return len(one.tokens) / (1 + self._clock - one.used_at)

    def put(self, kept: Kept, stays: bool = True) -> None:
        """Keep a text for which room was made, here or, if it cannot stay, on disk alone."""
        kept.used_at = self._clock
        if stays:
            self._kept.append(kept)
        if self.disk is not None:
            (self.disk.left if stays else self.disk.evicted)(kept)

    def best(self, prompt: Sequence[int], only_big: bool) -> tuple[Kept | Saved | None, int]:
        """The text that saves most of ``prompt``, and how many tokens; ``only_big``: of its big rows."""
        found: Kept | Saved | None = None
        most = 0
        for one in self._kept:
            n = usable(one.tokens, one.n_big if only_big else len(one.tokens), one.checkpoints, prompt)
            if n > most:
                found, most = one, n
        if self.disk is not None:
            saved, n = self.disk.best(prompt, only_big)
            if n >= most + LEAST_TOKENS:  # fewer are computed sooner than they are read
                found, most = saved, n
        return found, most

    def take(self, found: Kept | Saved) -> Kept | None:
        """Take a text out, to go on with it; None if what is on disk is not what it was."""
        if not isinstance(found, Kept):
            return None if self.disk is None else self.disk.take(found)
        self._kept.remove(found)
        if self.disk is not None:
            self.disk.gone_on(found)
        points = found.checkpoints
        # the text grows, and what is being written meanwhile must not
        return replace(found, tokens=list(found.tokens), checkpoints=None if points is None else list(points))

    def clear(self) -> None:
        """Drop all texts."""
        self._kept.clear()
