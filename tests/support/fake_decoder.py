"""A context without llama.cpp: rows of several sequences in cells that all share, and logits made up of them.

What it "computes" depends on every row of the own sequence and on how many experts wrote it, so a row of
another, a position that was not run again, or one that was not overwritten changes the answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fake_backend import hashed_logits

from mobile_gguf.engine.structs import Counters, LossCounters
from mobile_gguf.generate.context.decoder import Slice
from mobile_gguf.generate.context.sequence import TokenSequence
from mobile_gguf.generate.passes.costs import Meter, Traffic
from mobile_gguf.generate.passes.decode import Pass, Policy
from mobile_gguf.generate.schedule.scheduler import Scheduler
from mobile_gguf.generate.sessions.prefix_cache import PrefixCache

_LOSSY = 1000  # more than experts that wrote a row, where rules for missing ones were in force


@dataclass
class FakeNative:
    n_sequences: int = 1
    n_ctx: int = 256
    n_batch: int = 16
    n_ubatch: int = 16
    n_vocab: int = 1000
    is_apart: bool = False
    can_step_back: bool = True


class FakeDecoder:
    """Stands in for Decoder; ``passes`` are the slices of each decode, ``errors`` what one of them raises."""

    engine = None
    head = None
    as_with_ubatch = 0

    def __init__(self, native: FakeNative) -> None:
        self.native = native
        self.n_passes = 0
        self.passes: list[list[Slice]] = []
        self.errors: dict[int, BaseException] = {}
        self.refused: list[list[int]] = []
        self.counters = Counters()
        self.loss = LossCounters()
        self._rows: list[list[tuple[int, int]]] = [[] for _ in range(native.n_sequences)]
        self._outputs: dict[int, np.ndarray] = {}
        self._lost: dict[int, LossCounters] = {}

    def count_anew(self) -> None:
        self.counters, self.loss = Counters(), LossCounters()

    @property
    def n_cells(self) -> int:
        return sum(map(len, self._rows))

    def run(self, slices: Sequence[Slice]) -> list[int]:
        self.n_passes += 1
        self.passes.append(list(slices))
        n_tokens = sum(len(slice_.tokens) for slice_ in slices)
        assert 0 < n_tokens <= self.native.n_batch
        assert len({slice_.number for slice_ in slices}) == len(slices)
        assert len({slice_.rules for slice_ in slices} - {None}) <= 1
        self.counters = self.counters + Counters(n_hits=7 * n_tokens, n_misses=n_tokens, bytes_read=1001)
        self._outputs, self._lost, at, last = {}, {}, -1, []
        for slice_ in slices:
            rows = self._rows[slice_.number]
            assert len(rows) == slice_.start
            for token in slice_.tokens:
                rows.append((token, slice_.experts + _LOSSY * (slice_.rules is not None)))
                at += 1
                if slice_.every_output:
                    self._outputs[at] = hashed_logits(rows)
                if slice_.rules is not None:
                    self._lost[at] = LossCounters(n_layers=2, n_dropped=token % 3, moved_weight=token % 7 / 8)
                    self.loss = self.loss + self._lost[at]
            self._outputs[at] = hashed_logits(rows)
            last.append(at)
        if (error := self.errors.pop(self.n_passes, None)) is not None:
            self._outputs = {}  # but rows have been written
            raise error
        if not self.native.is_apart:
            assert self.n_cells <= self.native.n_ctx, "there are no more cells"
        return last

    def refuse(self, places: Sequence[int]) -> None:
        self.refused.append(list(places))

    def logits(self, i: int = -1) -> np.ndarray:
        return self._outputs[i]

    def lost(self, i: int) -> LossCounters:
        return self._lost[i]

    def cut(self, start: int, number: int = 0) -> bool:
        rows = self._rows[number]
        if start < len(rows) and start > 0 and not self.native.can_step_back:
            return False
        del rows[start:]
        return True

    def copy(self, number: int, to: int, n: int) -> None:
        self._rows[to] = self._rows[number][:n]

    def clear(self, number: int = 0) -> None:
        self._rows[number].clear()

    def state_bytes(self, partial: bool = False, number: int = 0) -> int:
        return 8 * len(self._rows[number])

    def save(self, partial: bool = False, number: int = 0) -> Any:
        return np.array(self._rows[number], np.int32)

    def load(self, data: Any, partial: bool = False, number: int = 0) -> bool:
        self._rows[number] = [(int(token), int(experts)) for token, experts in data]
        return True

    @contextlib.contextmanager
    def explained(self, should_stop: Any = None, long: bool = True) -> Iterator[None]:
        yield


def make(
    n_sequences: int, cache_bytes: int = 1 << 20, **settings: Any
) -> tuple[Scheduler, FakeDecoder, list[TokenSequence]]:
    """A scheduler over a made-up context. ``settings`` are FakeNative's."""
    decoder: Any = FakeDecoder(FakeNative(n_sequences, **settings))
    cache = PrefixCache(cache_bytes, lambda _kept: 1 << 30)
    sequences = [TokenSequence(decoder, decoder.native.n_ctx, cache, i) for i in range(n_sequences)]
    meter = Meter(lambda: Traffic(decoder.counters, loss=decoder.loss), decoder.count_anew)
    scheduler = Scheduler(decoder, sequences, meter, n_expert_used=8, in_turn=decoder.native.is_apart)
    return scheduler, decoder, sequences


def answer(
    scheduler: Scheduler, prompt: list[int], n: int, policy: Policy, should_stop: Any = None
) -> Generator[tuple[int, Pass], None, None]:
    """``n`` likeliest tokens after a prompt, each with the pass its logits came from."""
    with scheduler.seated(prompt, policy.always_big) as sequence:
        sequence.policy, sequence.should_stop = policy, should_stop
        sequence.run_prompt(sequence.begin(prompt))
        for _ in range(n):
            token = int(np.argmax(sequence.last_logits()))
            yield token, sequence.last_pass
            if should_stop is not None and should_stop():
                return
            sequence.run_token(token)
