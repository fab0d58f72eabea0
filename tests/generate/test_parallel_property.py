"""By chance over the engine: arrivals, lengths, modes, cancels, forks, edits; each answer as it is alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from askers import ATTENTION, HYBRID, Asker, alone, check_nearly_the_same, empty, load, modes_of, text

from mobile_gguf import Model

pytestmark = pytest.mark.engine
N_ANSWERS, NEVER = 14, 1 << 30
KINDS = ("new", "fork", "edit", "again", "goes on")
EXACT = {"mode": "exact"}


@pytest.fixture(scope="module", params=[ATTENTION, HYBRID])
def one(request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(request.param) as loaded:
        yield loaded


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "deterministic"])
def several(request: pytest.FixtureRequest, one: Model) -> Iterator[Model]:
    with load(one.path, parallel=3, deterministic=request.param) as loaded:
        yield loaded


@dataclass
class Turn(Asker):
    """An asker who may leave at any decode; ``kind`` says what the prompt has to do with earlier texts."""

    kind: str = "new"
    leaves_at: int = NEVER
    now: int = 0  # decodes

    def is_gone(self) -> bool:
        return super().is_gone() or self.now >= self.leaves_at

    @property
    def goes_on(self) -> bool:
        return bool(self.options.get("cache_prompt"))


def next_turn(chance: random.Random, before: list[Turn], modes: list[dict[str, Any]], now: int) -> Turn:
    """What begins anew is of any mode; what goes on with another text is exact, or hangs on who wrote it."""
    kind = KINDS[len(before) % len(KINDS)]
    question = text(chance, chance.randrange(1, 40))
    prompt, options = question, chance.choice(modes) | {"cache_prompt": False}
    if kind != "new":
        other = chance.choice(chance.choice([before, before[-2:]]))
        said = other.prompt + other.tokens
        prompt = {
            "fork": said[: chance.randrange(1, len(said) + 1)] + question,
            "edit": other.prompt[: -chance.randrange(1, 40)] + question,
            "again": other.prompt,
            "goes on": said + question,
        }[kind]
        options = EXACT | {"cache_prompt": True}
    leaves = chance.choice([NEVER, NEVER, chance.randrange(1, 9)])
    leaves_at = chance.choice([NEVER, NEVER, now + chance.randrange(9)])
    n = chance.randrange(1, 20)
    return Turn(prompt[:200], n, options, leaves, kind=kind, leaves_at=leaves_at)


@pytest.mark.parametrize("seed", range(3))
def test_each_answer_is_as_it_is_alone_whatever_comes_when(one: Model, several: Model, seed: int) -> None:
    chance, crew, now = random.Random(seed), several.crew, 0
    turns: list[Turn] = []
    # beside others last digits differ, and with them now and then what is run again
    modes = modes_of(one) if several.options.deterministic else modes_of(one)[:2]
    empty(several)
    while len(turns) < N_ANSWERS or crew.n_running:
        is_room = crew.n_running < crew.most and len(turns) < N_ANSWERS
        if is_room and (not crew.n_running or chance.random() < 0.3):
            turns.append(next_turn(chance, turns, modes, now))
            crew.spawn(turns[-1].work(several))
        now += 1
        for turn in turns:
            turn.now = now
        crew.advance()
    for turn in turns:
        assert turn.error is None
        n = len(turn.tokens)
        assert n == min(turn.n, turn.leaves_after) or turn.leaves_at < NEVER
        expected = alone(one, Asker(turn.prompt, turn.n, turn.options | {"cache_prompt": False}))
        expected.tokens, expected.logits = expected.tokens[:n], expected.logits[:n]
        if several.options.deterministic and not turn.goes_on:
            assert turn.tokens == expected.tokens
            np.testing.assert_array_equal(turn.logits, expected.logits)
        else:
            check_nearly_the_same(turn, expected)
