"""Drafts from the text itself: the longest and latest match is followed, as a plain search finds it."""

from __future__ import annotations

import random

import pytest

from mobile_gguf.generate.speculation.lookup import LEAST_MATCH, LONGEST_MATCH, Lookup, class_of
from mobile_gguf.generate.speculation.source import LookupSource


def searched(text: list[int], most: int) -> tuple[list[int], int]:
    """The same by trying every place."""
    best, length = 0, 0
    for place in range(LEAST_MATCH, len(text)):
        n = 0
        while n < min(place, LONGEST_MATCH) and text[place - 1 - n] == text[len(text) - 1 - n]:
            n += 1
        if n >= max(LEAST_MATCH, length):
            best, length = place, n
    if not length:
        return [], 0
    drafted = list(text)
    for i in range(most):
        drafted.append(drafted[best + i])
    return drafted[len(text) :], length


@pytest.mark.parametrize("seed", range(20))
def test_it_is_what_a_search_finds(seed: int) -> None:
    chance = random.Random(seed)
    lookup, text = Lookup(), []
    for _ in range(60):
        new = [chance.randrange(3) for _ in range(chance.randrange(1, 4))]
        text += new
        lookup.add(new)
        found, match = lookup.draft(6)
        expected, length = searched(text, 6)
        assert match == length
        # of more than so many places only the latest are looked at: few texts here have them
        if len(text) < 40:
            assert found == expected


def test_what_followed_the_same_words_is_drafted() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 9, 2, 3, 4])
    assert lookup.draft(3) == ([5, 6, 7], 3)
    lookup.add([5])
    assert lookup.draft(8) == ([6, 7, 9, 2, 3, 4, 5, 6], 4)


def test_a_longer_match_is_followed_before_a_later_one() -> None:
    assert Lookup([1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3]).draft(1) == ([4], 3)
    assert Lookup([2, 3, 4, 9, 2, 3, 7, 1, 2, 3]).draft(1) == ([7], 2)


def test_a_period_goes_on() -> None:
    assert Lookup([5, 6, 7, 5, 6, 7, 5]).draft(7) == ([6, 7, 5, 6, 7, 5, 6], 4)
    assert Lookup([8, 8, 8]).draft(3) == ([8, 8, 8], 2)


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3, 4, 5], [1, 2, 3, 4, 2]])
def test_nothing_is_drafted_where_nothing_came_before(tokens: list[int]) -> None:
    assert Lookup(tokens).draft(4) == ([], 0)
    assert Lookup([1, 2, 1, 2]).draft(0) == ([], 0)


def test_longer_matches_are_of_another_kind() -> None:
    assert [class_of(n) for n in (2, 3, 4, 7, 8, 16)] == ["2+", "2+", "4+", "4+", "8+", "8+"]


def test_a_prediction_is_looked_up_from_the_answers_first_token_on() -> None:
    source = LookupSource([7, 8, 9, 10])
    source.add([1, 2, 3])
    assert source.draft(4) == [7, 8, 9, 10]
    source.add([7, 8])
    assert source.draft(2) == [9, 10]
    source.add([50, 9])
    assert source.offer(2).n == 0
    source.add([10])
    assert source.draft(1) == [1]  # which the prompt begins with, that comes behind it
