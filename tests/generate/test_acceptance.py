"""What is taken of drafts is distributed as the model's own answers; rules that are nearly right are not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mobile_gguf.generate.speculation.acceptance import Acceptance, verified

N_DRAWS = 20_000
LENGTH = 4
# What a model says after the last token, and a worse one that guesses: four tokens each.
MODEL = np.array(
    [[0.7, 0.2, 0.08, 0.02], [0.1, 0.5, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.9, 0.04, 0.01]]
)
GUESS = np.array([[0.4, 0.4, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.1, 0.1]])

Rule = Callable[[random.Random, int, list[int]], list[int]]


def drawn(chance: random.Random, probabilities: np.ndarray) -> int:
    return chance.choices(range(len(probabilities)), list(probabilities))[0]


def plainly(chance: random.Random) -> tuple[int, ...]:
    text = [0]
    for _ in range(LENGTH):
        text.append(drawn(chance, MODEL[text[-1]]))
    return tuple(text[1:])


def ours(chance: random.Random, last: int, draft: list[int]) -> list[int]:
    """One pass over a draft: ``verified`` on the toy model, which goes on as drafted tokens are taken."""
    at = [last]
    ahead = list(draft)

    def accept(token: int) -> bool:
        if not ahead or ahead.pop(0) != token:
            return False
        at.append(token)
        return True

    return [token for token, _ in verified(draft, lambda: drawn(chance, MODEL[at[-1]]), accept)]


def leviathan(chance: random.Random, last: int, draft: list[int], *, again: bool = False) -> list[int]:
    """The rule as published, for drafts that name one token; ``again``: what was refused may come back."""
    said: list[int] = []
    for token in draft:
        p = MODEL[last].copy()
        if chance.random() < p[token]:
            said.append(token)
            last = token
            continue
        if not again:
            p[token] = 0.0
        return [*said, drawn(chance, p / p.sum())]
    return [*said, drawn(chance, MODEL[last])]


def too_kind(chance: random.Random, last: int, draft: list[int]) -> list[int]:
    """Takes what is likely enough, as lossy rules do."""
    said: list[int] = []
    for token in draft:
        if MODEL[last][token] < 0.25:
            break
        said.append(token)
        last = token
    return [*said, drawn(chance, MODEL[last])]


def by_likeliest(_chance: random.Random, last: int, n: int) -> list[int]:
    found: list[int] = []
    for _ in range(n):
        last = int(np.argmax(GUESS[last]))
        found.append(last)
    return found


def by_chance(chance: random.Random, last: int, n: int) -> list[int]:
    found: list[int] = []
    for _ in range(n):
        last = drawn(chance, GUESS[last])
        found.append(last)
    return found


def speculated(chance: random.Random, rule: Rule, guess: Callable[..., list[int]], n: int) -> tuple[int, ...]:
    text = [0]
    while len(text) <= LENGTH:
        text += rule(chance, text[-1], guess(chance, text[-1], n))
    return tuple(text[1 : LENGTH + 1])


def chi_square(found: Counter[tuple[int, ...]], n: int) -> tuple[float, int]:
    """Against the model's own probabilities of texts, rare ones together; with its degrees of freedom."""
    expected: dict[tuple[int, ...], float] = {(): float(n)}
    for _ in range(LENGTH):
        expected = {
            (*text, token): share * MODEL[text[-1] if text else 0][token]
            for text, share in expected.items()
            for token in range(4)
        }
    rare = [text for text, share in expected.items() if share < 10]
    cells = [(found[text], share) for text, share in expected.items() if share >= 10]
    if rare:
        cells.append((sum(found[text] for text in rare), sum(expected[text] for text in rare)))
    return sum((seen - share) ** 2 / share for seen, share in cells), len(cells) - 1


def is_the_models(draw: Callable[[], tuple[int, ...]]) -> bool:
    """Whether chance would give so large a chi-square once in ten thousand times (Wilson and Hilferty)."""
    value, degrees = chi_square(Counter(draw() for _ in range(N_DRAWS)), N_DRAWS)
    z = ((value / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    return z < 3.72


@pytest.mark.parametrize("guess", [by_likeliest, by_chance])
@pytest.mark.parametrize("n", [1, 3])
def test_texts_are_distributed_as_the_models(guess: Callable[..., list[int]], n: int) -> None:
    chance = random.Random(n)
    assert is_the_models(lambda: speculated(chance, ours, guess, n))


def test_plain_texts_pass_the_test_and_wrong_rules_do_not() -> None:
    chance = random.Random(7)
    assert is_the_models(lambda: plainly(chance))
    assert is_the_models(lambda: speculated(chance, leviathan, by_likeliest, 3))
    for wrong in (too_kind, lambda *given: leviathan(*given, again=True)):
        assert not is_the_models(lambda rule=wrong: speculated(chance, rule, by_likeliest, 3))


def test_a_draft_is_taken_as_often_as_the_published_rule_takes_it() -> None:
    shares = []
    for rule in (ours, leviathan):
        chance = random.Random(3)
        lengths = [len(rule(chance, 0, by_likeliest(chance, 0, 3))) for _ in range(N_DRAWS)]
        shares.append(np.mean(lengths))
    assert abs(shares[0] - shares[1]) < 0.03


def test_each_token_says_whether_it_was_drafted() -> None:
    said = iter([5, 6, 9])
    assert list(verified([5, 6, 7], lambda: next(said), lambda _token: True)) == [
        (5, True),
        (6, True),
        (9, False),
    ]
    said = iter([5, 6])
    assert list(verified([5], lambda: next(said), lambda _token: True)) == [(5, True), (6, False)]
    said = iter([5, 6])
    assert list(verified([5, 6], lambda: next(said), lambda _token: False)) == [(5, True)]  # its row is gone


def test_what_is_taken_is_learnt_by_place_and_kind() -> None:
    acceptance = Acceptance(4)
    assert acceptance.expected("new", 2) == pytest.approx(1 + 0.6 + 0.36)
    for _ in range(200):
        acceptance.add("code", 0, True)
        acceptance.add("code", 1, False)
    assert acceptance.at("code", 0) > 0.97
    assert acceptance.at("code", 1) < 0.03
    assert acceptance.at("prose", 0) == pytest.approx(0.6)
    assert acceptance.expected("code", 4) == pytest.approx(2, abs=0.06)


def test_another_text_is_learnt_sooner() -> None:
    sure, doubting = Acceptance(2), Acceptance(2)
    for acceptance in (sure, doubting):
        for _ in range(200):
            acceptance.add("code", 0, True)
    doubting.doubt()
    assert doubting.at("code", 0) == pytest.approx(sure.at("code", 0))
    for acceptance in (sure, doubting):
        for _ in range(5):
            acceptance.add("code", 0, False)
    assert doubting.at("code", 0) < 0.45 < sure.at("code", 0)


def test_a_place_that_is_drafted_no_more_gets_another_chance() -> None:
    """Short drafts do not show whether longer ones were right now: with each text the place before counts."""
    acceptance = Acceptance(2)
    for _ in range(50):
        acceptance.add("code", 0, True)
        acceptance.add("code", 1, False)
    found = [acceptance.at("code", 1)]
    for _ in range(3):
        acceptance.doubt()
        acceptance.add("code", 0, True)
        found.append(acceptance.at("code", 1))
    assert found == sorted(found)
    assert found[0] < 0.05
    assert found[-1] > 0.2


def test_what_is_not_known_of_a_place_is_taken_from_the_one_before() -> None:
    acceptance = Acceptance(3, {"long": 0.9})
    assert acceptance.rates("long") == [0.9] * 3
    acceptance.add("long", 0, False)
    first, *others = acceptance.rates("long")
    assert first < 0.65
    assert others == [first] * 2
    for _ in range(30):
        acceptance.add("long", 1, True)
    assert acceptance.at("long", 1) > 0.95
    assert acceptance.at("long", 0) == first
