"""States for the MTP block: what goes with which token, and what is dropped when a text turns."""

from __future__ import annotations

import random

import numpy as np

from mobile_gguf.generate.speculation.states import LEAST, MOST, TextStates


def rows(start: int, n: int, width: int = 2) -> np.ndarray:
    """States that say of which place they are."""
    return np.repeat(np.arange(start, start + n, dtype=np.float32)[:, None], width, 1)


def took(text: TextStates, start: int, tokens: list[int]) -> None:
    text.took(start, tokens, rows(start, len(tokens)))


def run(text: TextStates, place: int, end: int) -> list[int]:
    """The block runs what is due; returns the places of the states that go with the tokens, -1: none."""
    states = text.rows(place, end)
    text.had += text.tokens[place - text.first : end - text.first]
    return [-1 if place == i == 0 else int(row[0]) for i, row in enumerate(states)]


def test_a_token_goes_with_the_state_before_it() -> None:
    text = TextStates(2)
    took(text, 0, [5, 6, 7, 8])
    assert text.due() == 0
    assert text.rows(0, 4)[0].tolist() == [0.0, 0.0]
    assert run(text, 0, 4) == [-1, 0, 1, 2]
    assert text.due() == 4
    assert text.follows([5, 6, 7, 8, 9])
    assert text.rows(4, 5).tolist() == [[3.0, 3.0]]


def test_it_follows_only_where_the_state_before_is_there() -> None:
    text = TextStates(2)
    assert not text.follows([5])
    took(text, 0, [5, 6, 7, 8])
    assert text.follows([5, 6, 7, 8])  # as if 8 had not been run
    assert text.tokens == [5, 6, 7]
    assert not text.follows([5, 6, 9, 8, 1])
    assert text.tokens == [5, 6]
    text.skipped(1)
    assert (text.tokens, text.end) == ([5], 1)
    assert not text.follows([5, 6, 7])


def test_drafted_tokens_that_were_refused_are_dropped() -> None:
    text = TextStates(2)
    took(text, 0, [5, 6])
    run(text, 0, 2)
    text.had.append(7)  # the last token of [5, 6, 7], which the block has already
    took(text, 2, [7, 30, 31, 32])
    assert text.had == [5, 6, 7]
    assert text.follows([5, 6, 7, 30, 9])
    assert (text.had, text.tokens) == ([5, 6, 7], [5, 6, 7, 30])
    assert text.due() == 3
    assert text.rows(3, 5).tolist() == rows(2, 2).tolist()
    took(text, 1, [8, 9])  # the text turns
    assert (text.had, text.tokens) == ([5], [5, 8, 9])


def test_a_gap_begins_anew() -> None:
    text = TextStates(2)
    took(text, 0, [5, 6, 7])
    run(text, 0, 3)
    took(text, 10, [8, 9])
    assert (text.first, text.had) == (10, [5, 6, 7])
    assert text.due() == 11  # behind the first token that has a state
    assert (text.begin, text.had) == (11, [])
    assert run(text, 11, 12) == [10]
    assert text.follows([*range(100, 110), 8, 9, 4])


def test_few_states_are_kept_and_the_next_goes_on() -> None:
    text = TextStates(2)
    tokens = list(range(MOST + 40))
    took(text, 0, tokens)
    run(text, 0, len(tokens))
    text.shorten(MOST)
    assert (len(text.tokens), text.end) == (LEAST, len(tokens))
    assert text.due() == len(tokens)
    assert text.rows(len(tokens), len(tokens) + 1).tolist() == rows(len(tokens) - 1, 1).tolist()
    text.shorten(MOST)
    assert len(text.tokens) == LEAST


class Made:
    """States that no other place or time has; ``of``: the last ones of each place."""

    def __init__(self) -> None:
        self.n = 0
        self.of: dict[int, int] = {}

    def rows(self, start: int, n: int) -> np.ndarray:
        for place in range(start, start + n):
            self.n += 1
            self.of[place] = self.n
        return np.array([[self.of[place]] for place in range(start, start + n)], np.float32)


def test_whatever_happens_a_token_goes_with_its_own_state() -> None:
    """Random turns: the block's tokens are those of the text, each with the state of the place before."""
    chance = random.Random(1)
    for _ in range(60):
        text, said, made = TextStates(1), [], Made()

        for _ in range(40):
            start = chance.randrange(max(0, len(said) - 6), len(said) + 1)
            n_new = chance.randrange(1, 5)
            if chance.random() < 0.1:  # another text, or the same one's beginning
                start, n_new = chance.choice((0, len(said) // 2)), chance.randrange(1, MOST + 9)
            del said[start:]
            new = [chance.randrange(3) for _ in range(n_new)]
            said += new
            if chance.random() < 0.1:
                text.skipped(start)
                continue
            text.took(start, new, made.rows(start, len(new)))
            text.shorten(chance.choice((LEAST, MOST)))
            last = chance.randrange(3)
            if text.follows([*said, last]) and chance.random() < 0.5:
                place = text.due()
                assert place <= len(said)  # the last token is run, whatever was
                given = text.rows(place, len(said) + 1)[:, 0].tolist()
                expected = [made.of[p - 1] if p else 0 for p in range(place, len(said) + 1)]
                assert given == expected
                text.had += [*said, last][place:]
                assert text.had == [*said, last][text.begin :]
                if chance.random() < 0.2:
                    continue  # what was drafted is not run
                said.append(last)
                text.took(len(said) - 1, [last], made.rows(len(said) - 1, 1))
