"""Which texts are kept when others take the context, and which one a prompt goes on with; no engine."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mobile_gguf.generate.sessions.prefix_cache import Checkpoint, Kept, PrefixCache, common_length, usable

MIB = 1 << 20


def kept(tokens: list[int], n_bytes: int = 1000, n_big: int | None = None) -> Kept:
    return Kept(tokens, len(tokens) if n_big is None else n_big, np.zeros(n_bytes, np.uint8))


def put(cache: PrefixCache, one: Kept) -> bool:
    if not cache.make_room(one.tokens, one.n_bytes):
        return False
    cache.put(one)
    return True


def test_a_prompt_goes_on_with_the_text_that_saves_most() -> None:
    cache = PrefixCache(MIB, lambda _kept: MIB)
    for text in ([1, 2, 3, 4], [1, 2, 9, 9, 9], [7, 7]):
        assert put(cache, kept(text))
    found, n = cache.best([1, 2, 3, 4, 5, 6], only_big=False)
    assert (found and found.tokens, n) == ([1, 2, 3, 4], 4)
    found, n = cache.best([7, 7], only_big=False)
    assert (found and found.tokens, n) == ([7, 7], 1), (
        "the last token is always computed: its logits are wanted"
    )
    assert cache.best([5, 1, 2], only_big=False) == (None, 0)
    found, _ = cache.best([7, 7, 8], only_big=False)
    assert found is not None
    taken = cache.take(found)
    assert taken is not None
    assert taken.tokens == [7, 7]
    assert cache.best([7, 7, 8], only_big=False) == (None, 0)


def test_an_exact_answer_builds_on_big_rows_only() -> None:
    cache = PrefixCache(MIB, lambda _kept: MIB)
    put(cache, kept([1, 2, 3, 4, 5], n_big=2))
    assert cache.best([1, 2, 3, 4, 5, 6], only_big=True)[1] == 2
    assert cache.best([1, 2, 3, 4, 5, 6], only_big=False)[1] == 5


@pytest.mark.parametrize(
    ("prompt", "n"),
    [(range(9), 8), (range(20), 10), ([*range(7), 99], 6), ([*range(5), 99], 3), ([0, 99], 0)],
)
def test_what_cannot_be_rolled_back_goes_on_from_a_checkpoint(prompt: list[int], n: int) -> None:
    points = [Checkpoint(at, np.zeros(1, np.uint8)) for at in (3, 6, 8)]
    assert usable(range(10), 10, points, list(prompt)) == n


def test_what_a_text_contains_goes_when_it_is_kept() -> None:
    cache = PrefixCache(MIB, lambda _kept: MIB)
    put(cache, kept([1, 2, 3]))
    put(cache, kept([1, 2, 4]))
    put(cache, kept([1, 2, 3, 4, 5]))
    assert len(cache) == 2


def test_the_budget_holds_and_the_least_worthy_goes_first() -> None:
    cache = PrefixCache(2500, lambda _kept: MIB)
    long, short, new = [1] * 100, [2] * 40, [3] * 50
    for text in (long, short, new):
        assert put(cache, kept(text))
    assert cache.n_bytes == 2000
    assert cache.best([*short, 0], only_big=False) == (None, 0)
    assert cache.best([*long, 0], only_big=False)[1] == 100
    assert not put(cache, kept([4] * 10)), "nothing goes that is worth more"
    assert not put(cache, kept([5] * 500, n_bytes=2600)), "no text is larger than all of them may be"
    for i in range(200):  # what nobody asks for is worth less and less
        cache.make_room([6 + i], MIB)
    assert put(cache, kept([4] * 10))


def test_memory_that_is_not_free_is_not_taken() -> None:
    free = [1500]
    cache = PrefixCache(MIB, lambda _kept: free[0])
    assert put(cache, kept([1] * 50))
    free[0] = 500
    assert not cache.has_room(1000)
    assert put(cache, kept([2] * 60)), "what goes makes room"
    assert len(cache) == 1
    free[0] = 0
    assert not put(cache, kept([3] * 70, n_bytes=1001))


def test_random_texts_never_exceed_the_limit_and_find_the_longest_beginning() -> None:
    chance = random.Random(1)
    cache = PrefixCache(5000, lambda _kept: MIB)
    for _ in range(300):
        text = [chance.randrange(2) for _ in range(chance.randrange(1, 12))]
        put(cache, kept(text, n_bytes=chance.randrange(1, 1500)))
        assert cache.n_bytes <= 5000
        prompt = [chance.randrange(2) for _ in range(chance.randrange(1, 12))]
        _, n = cache.best(prompt, only_big=False)
        lengths = [common_length(one.tokens, prompt) for one in cache._kept]
        assert n == max((min(length, len(prompt) - 1) for length in lengths), default=0)
