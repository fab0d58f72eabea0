"""What a token takes under splits of experts, measured in the engine on the text that a plan is made for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from mobile_gguf.engine.split import Split, set_split
from mobile_gguf.generate.pricing import opened
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.progress import Progress

from .collect import decode, forget

# Tokens that fill the memory, those that another split needs to have its segments there, and those timed.
_FILL, _SETTLE, _TIMED = 192, 64, 64
_ROUNDS = 2


def time_splits(
    info: GgufInfo,
    blocks: list[list[int]],
    splits: Sequence[Split | None],
    n_bytes: int,
    threads: int,
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of a token under each split, None for whole experts, in ``n_bytes`` of host memory.

    They take turns; a token is computed alone, as in an answer. Of each the median of its turns.
    """
    found: list[list[float]] = [[] for _split in splits]
    with opened(info, n_bytes, n_ctx=max(map(len, blocks)), threads=threads) as llama:
        assert llama.engine is not None
        text = _positions(blocks)

        def run(n: int) -> float:
            started = clock()
            for _ in range(n):
                token, position = next(text)
                if position == 0:
                    forget(llama)
                decode(llama, [token], position)
            return (clock() - started) / n

        progress("filling the memory", 0.0)
        run(_FILL)
        for number in range(_ROUNDS):
            for i, split in enumerate(splits):
                done = (number * len(splits) + i) / (_ROUNDS * len(splits))
                progress("measuring what a token takes", done)
                set_split(llama.engine, llama.ctx, split)
                if len(splits) > 1:
                    run(_SETTLE)
                found[i].append(run(_TIMED))
    return [statistics.median(times) for times in found]


def _positions(blocks: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Tokens of the text and their places in the context, over and over."""
    while True:
        for block in blocks:
            yield from ((token, i) for i, token in enumerate(block))
