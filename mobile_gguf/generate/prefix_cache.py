"""Conversations that another one has put out of the context, kept in memory until one of them goes on.

Pure: what is kept is bytes that somebody else makes and takes. A text that comes continues the one here with
which it has most in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Bytes of all states together, where nobody says how many they may have.
AUTO_BYTES = 2 << 30
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


class PrefixCache:
    """Texts that were put away, within ``limit_bytes`` and ``room_bytes(kept)``, asked before each is taken.

    ``kept`` are the bytes that are kept already: here, and ``beside``, which others keep in the same limits.

    The least worthy goes first: the one with the fewest tokens, the longer nobody wanted it the fewer.
    """

    def __init__(self, limit_bytes: int, room_bytes: Callable[[int], int]) -> None:
        self.limit_bytes = limit_bytes
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
        return True

    def _worth(self, one: Kept) -> float:
        return len(one.tokens) / (1 + self._clock - one.used_at)

    def put(self, kept: Kept) -> None:
        """Keep a text for which room was made."""
        kept.used_at = self._clock
        self._kept.append(kept)

    def best(self, prompt: Sequence[int], only_big: bool) -> tuple[Kept | None, int]:
        """The text that saves most of ``prompt``, and how many tokens; ``only_big``: of its big rows."""
        found, most = None, 0
        for one in self._kept:
            n = usable(one.tokens, one.n_big if only_big else len(one.tokens), one.checkpoints, prompt)
            if n > most:
                found, most = one, n
        return found, most

    def take(self, kept: Kept) -> Kept:
        """Take a text out, to go on with it."""
        self._kept.remove(kept)
        return kept
