"""One sequence's tokens in a context: whose rows are there, how they leave, and how they come back.

What a row holds depends on the pass that wrote it, so it is known which rows all experts wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mobile_gguf.errors import EngineError

from ..passes.decode import ALL_EXPERTS
from ..sessions.prefix_cache import LEAST_TOKENS, Checkpoint, Kept, PrefixCache, common_length, usable
from .decoder import Decoder, Slice

if TYPE_CHECKING:
    from ..schedule.scheduler import Scheduler

# Of a memory that cannot be rolled back what it holds is kept after so many tokens.
BETWEEN = 512


class Cells:
    """The ``tokens`` of sequence ``number`` of a context; others are put away in ``cache`` meanwhile.

    An answer is made in them while they are ``is_taken``; they are ``away`` while others need the cells.
    """

    scheduler: Scheduler  # which sets it, for all of its context

    def __init__(self, decoder: Decoder, cache: PrefixCache, number: int) -> None:
        self.decoder = decoder
        self.cache = cache
        self.number = number
        self.tokens: list[int] = []
        self.is_taken = False
        self.away: list[int] = []
        self.used_at = self.served_at = 0  # for others to compare
        self._row, self._row_of = -1, -1  # the last output, and the decode that it is of
        self._is_lossy = False  # whether that might lose
        self._n_big = 0  # rows at the start that big passes wrote
        self._checkpoints: list[Checkpoint] | None = None if decoder.native.can_step_back else []
        self._is_wanted = True  # whether what is here may be put away
        self._ahead: list[int] = []  # drafted tokens that have rows behind those of the tokens
        self._n_big_ahead = 0  # rows at the start that big passes wrote, with theirs
        self._n_run = 0  # tokens of the last decode
        self._before: Checkpoint | None = None  # of a memory that cannot be rolled back, before a draft
        self.owed: list[int] = []  # tokens of the text that must be run once more

    @property
    def has_logits(self) -> bool:
        """Whether the logits after the last token are at hand."""
        return self._row_of == self.decoder.n_passes

    def took(self, taken: Slice, row: int) -> None:
        """A decode ran these tokens; the logits after the last one are output ``row``."""
        self._is_lossy = taken.rules is not None
        if taken.experts == ALL_EXPERTS and not self._is_lossy and self._n_big == len(self.tokens):
            self._n_big += len(taken.tokens)
        self.tokens += taken.tokens
        self._n_run = len(taken.tokens)
        self._row, self._row_of = row, self.decoder.n_passes

    def take_back(self, n: int) -> None:
        """Count all but the last ``n`` tokens of the last decode, of which there is an output each.

        The others are drafted: ``accept`` counts them one by one, ``drop_draft`` drops the rest.
        """
        start = len(self.tokens) - n
        self._ahead, self._n_big_ahead = self.tokens[start:], self._n_big
        del self.tokens[start:]
        self._n_big = min(self._n_big, start)
        self._row -= n

    def accept(self, token: int) -> bool:
        """Count the next drafted token if it is ``token``; False if it is not, or its row is gone."""
        if not (self._ahead and self.has_logits and self._ahead[0] == token):
            return False
        self.tokens.append(self._ahead.pop(0))
        self._n_big = min(len(self.tokens), self._n_big_ahead)
        self._row += 1
        self.scheduler.n_accepted += 1
        return True

    def drop_draft(self) -> None:
        """Have the drafted tokens that were not accepted leave, and count as never run.

        A memory that cannot be rolled back is then what it was before: what was accepted is ``owed``.
        """
        before, self._before = self._before, None
        if self._ahead:
            end = self._row + 1 + len(self._ahead)
            if self.has_logits:
                self.decoder.refuse(range(self._row + 1 if before is None else end - self._n_run, end))
            if before is None:
                self.cut()
            else:
                owed = self.tokens[before.n_tokens :]
                self._return_to(before)
                self.owed = owed
        if self._checkpoints is not None:
            self.mark_now_and_then()

    def hold(self) -> bool:
        """Keep what a memory that cannot be rolled back holds, until a draft is dropped; False: no room."""
        n = len(self.tokens)
        if self._checkpoints is None or (self._before is not None and self._before.n_tokens == n):
            return True
        n_bytes = self.decoder.state_bytes(True, self.number)
        has_room = self.cache.has_room(n_bytes, sum(one.n_bytes for one in self._checkpoints))
        state = self.decoder.save(True, self.number) if has_room else None
        self._before = Checkpoint(n, state) if state is not None else None
        return state is not None

    def drop_guesses(self, n: int) -> None:
        """Keep the first ``n`` tokens, behind which others were run only for a draft."""
        if self._before is None:
            self.keep(n)
        else:
            self._return_to(self._before)

    def _return_to(self, point: Checkpoint) -> None:
        if not (self.decoder.load(point.state, True, self.number) and self.cut(point.n_tokens)):
            self.forget()
            raise EngineError("what the model's memory held before a draft could not be restored")
        self.keep(point.n_tokens)

    @property
    def can_be_copied(self) -> bool:
        """Whether others may share the cells of these tokens."""
        native = self.decoder.native
        return native.can_step_back and not native.is_apart

    def n_usable(self, prompt: Sequence[int], only_big: bool) -> int:
        """How many tokens of ``prompt`` are here; ``only_big``: by big passes."""
        return usable(self.tokens, self._n_big if only_big else len(self.tokens), self._checkpoints, prompt)

    def forget(self) -> None:
        """Drop all tokens, so that the next prompt is computed from its first one."""
        self.keep(0)
        native = self.decoder.native
        if native.n_sequences > 1 or not native.can_step_back:
            self.decoder.clear(self.number)

    def keep(self, n: int) -> None:
        """Count the first ``n`` tokens only: the rows of the others go before the next pass."""
        del self.tokens[n:]
        self._n_big = min(self._n_big, n)
        if self._checkpoints is not None:
            self._checkpoints = [one for one in self._checkpoints if one.n_tokens <= n]
        self._row_of, self._ahead, self.owed = -1, [], []

    def turn_to(self, prompt: list[int], only_big: bool) -> None:
        """Put the tokens here away if ``prompt`` goes on with others, or drops many of them."""
        n_here = self.n_usable(prompt, only_big)
        kept = None
        while kept is None:  # what is on disk may be gone by now
            found, n_there = self.cache.best(prompt, only_big)
            if self._copies(prompt, only_big, max(n_here, n_there) + LEAST_TOKENS):
                return
            if found is None or n_there < n_here + LEAST_TOKENS:
                if len(self.tokens) >= common_length(self.tokens, prompt) + LEAST_TOKENS:
                    self.put_away()
                return
            kept = self.cache.take(found)
        if not self.replace_by(kept) and self.cache.has_room(kept.n_bytes):
            self.cache.put(kept)

    def replace_by(self, kept: Kept) -> bool:
        """Put the tokens here away, and have those of ``kept``; False if there is no room for them."""
        self.put_away()
        self.forget()
        has_room = self.scheduler.make_room(self, len(kept.tokens))
        if has_room and self.decoder.load(kept.state, number=self.number):
            self.tokens, self._n_big, self._checkpoints = kept.tokens, kept.n_big, kept.checkpoints
            return True
        self.decoder.clear(self.number)
        return has_room  # a state that the engine does not take is of no more use

    def copied(self) -> Kept | None:
        """A copy of what is here; None if there is none."""
        if not self.tokens or not self.cut():
            return None
        points = None if self._checkpoints is None else list(self._checkpoints)
        state = self.decoder.save(number=self.number)
        return None if state is None else Kept(list(self.tokens), self._n_big, state, points)

    def _copies(self, prompt: list[int], only_big: bool, least: int) -> bool:
        """Share the cells of another sequence that has so many tokens of ``prompt``; False if none has."""
        others = [one for one in self.scheduler.sequences if one is not self and one.can_be_copied]
        other = max(others, key=lambda one: one.n_usable(prompt, only_big), default=None)
        n = other.n_usable(prompt, only_big) if other is not None else 0
        if other is None or n < least:
            return False
        self.put_away()
        self.forget()
        self.decoder.copy(other.number, self.number, n)
        self.tokens, self._n_big = other.tokens[:n], min(other._n_big, n)
        return True

    def put_away(self, stays: bool = True) -> None:
        """Keep a copy of what is in the context, if there is room and it is worth it; on disk, if it may not
        stay in memory."""
        n = len(self.tokens)
        if not self._is_wanted or n < LEAST_TOKENS or not self.cut():
            return
        checkpoints = None if self._checkpoints is None else list(self._checkpoints)
        beside = sum(one.n_bytes for one in checkpoints or ())  # which move with it, or are kept by both
        n_bytes = self.decoder.state_bytes(number=self.number)
        stays = stays and self.cache.make_room(self.tokens, n_bytes, beside)
        if not stays and not self.cache.may_pass(n, n_bytes, beside):
            return
        state = self.decoder.save(number=self.number)
        if state is not None:
            self.cache.put(Kept(list(self.tokens), self._n_big, state, checkpoints), stays)

    def give_way(self) -> None:
        """Put the tokens away; those of an answer that is made come back."""
        if self.is_taken:
            self.away = list(self.tokens)
        self.put_away()
        self.forget()

    def come_back(self, only_big: bool) -> list[int]:
        """Have the tokens that are away here again; returns those that must be run, as of a prompt."""
        tokens, self.away = self.away, []
        self.turn_to([*tokens, 0], only_big)  # of a prompt the last token would be run in any case
        self.back_to(common_length(self.tokens, tokens))
        return tokens[len(self.tokens) :]

    def cut(self, n: int | None = None) -> bool:
        """Drop the places from ``n`` on, else those that are none of the tokens; False if it cannot."""
        self._ahead = []
        return self.decoder.cut(len(self.tokens) if n is None else n, self.number)

    def back_to(self, n: int) -> None:
        """Keep the first ``n`` tokens, or as many of them as the memory can go back to."""
        if n > 0 and self.cut(n):
            self.keep(n)
            return
        for point in reversed(self._checkpoints or []):
            goes_back = point.n_tokens <= n and self.decoder.load(point.state, True, self.number)
            if goes_back and self.cut(point.n_tokens):
                self.keep(point.n_tokens)
                return
        self.forget()

    def mark(self) -> None:
        """Keep what the memory holds, if it cannot be rolled back; the oldest of such goes first."""
        points, n = self._checkpoints, len(self.tokens)
        if points is None or n < (points[-1].n_tokens if points else 0) + LEAST_TOKENS:
            return
        n_bytes = self.decoder.state_bytes(True, self.number)
        while points and not self.cache.has_room(n_bytes, sum(one.n_bytes for one in points)):
            del points[0]
        if not self.cache.has_room(n_bytes):
            return
        state = self.decoder.save(True, self.number)
        if state is not None:
            points.append(Checkpoint(n, state))

    def most_at_once(self) -> int:
        """Tokens of a decode, of which there may be a mark between two."""
        native = self.decoder.native
        if self._checkpoints is None:
            return native.n_batch
        return min(native.n_batch, max(1, BETWEEN // native.n_ubatch) * native.n_ubatch)

    def mark_now_and_then(self) -> None:
        points = self._checkpoints
        if points is not None and len(self.tokens) >= (points[-1].n_tokens if points else 0) + BETWEEN:
            self.mark()
