"""Conversations that take turns on one model: each goes on where it was, with the answers it has alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import tiny_models

import mobile_gguf
from mobile_gguf import Model
from mobile_gguf.api.model import backend_of
from mobile_gguf.generate.context import cells
from mobile_gguf.options.words import CONFIDENCE

pytestmark = pytest.mark.engine
ATTENTION, HYBRID = "qwen3moe", "nemotron-h"
BETWEEN = 64  # tokens from one checkpoint to the next, and what a hybrid's turn may compute anew


@pytest.fixture(scope="module", params=[ATTENTION, HYBRID])
def once(request: pytest.FixtureRequest) -> Iterator[Model]:
    path = tiny_models.path(request.param)
    with mobile_gguf.load(
        path, ram_budget="60%", n_ctx=1024, n_batch=32, n_ubatch=32, threads=1, threads_batch=1
    ) as loaded:
        yield loaded


@pytest.fixture
def model(once: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(cells, "BETWEEN", BETWEEN)
    empty(once)
    return once


def empty(model: Model) -> None:
    backend = backend_of(model)
    backend.sequence.cache._kept.clear()
    backend.sequence.forget()


def text(seed: int, n: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 200) for _ in range(n)]


class Talk:
    """A conversation: what was said, and what answering it took."""

    def __init__(self, beginning: list[int], mode: str = "exact") -> None:
        self.tokens = list(beginning)
        self.mode = mode
        self.logits: list[np.ndarray] = []

    def turn(self, model: Model, question: list[int], n: int = 4) -> int:
        """Ask and be answered; returns how many tokens of the prompt were computed beyond the question's."""
        prompt = self.tokens + question
        reply = model.generate(
            prompt, temperature=0, max_tokens=n, mode=self.mode,
            on_chunk=lambda _: self.logits.append(np.array(model.last_logits())),
        )  # fmt: skip
        self.tokens = prompt + list(reply.tokens)
        return int(reply.timings["prompt_n"]) - len(question)


def talks(system: list[int]) -> list[Talk]:
    return [Talk(system + text(i, 150), mode) for i, mode in enumerate(("exact", "little", "exact"))]


def test_conversations_that_take_turns_are_as_they_are_alone(model: Model) -> None:
    system, chance = text(9, 40), random.Random(2)
    order = [0, 1, 0, 1, *(chance.randrange(3) for _ in range(12))]
    together = talks(system)
    extra = [together[i].turn(model, text(100 + at, 12)) for at, i in enumerate(order)]
    seen = set()
    for i, n in zip(order, extra, strict=True):
        # the last token of an answer was never run, and a prompt is at least two
        assert n <= 2 if i in seen else n <= 190
        seen.add(i)
    alone = talks(system)
    for i, talk in enumerate(alone):
        empty(model)
        for at in (at for at, who in enumerate(order) if who == i):
            talk.turn(model, text(100 + at, 12))
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        # what is shared with another was computed in its batches, so the first digits only may differ by them
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)


def test_an_edit_and_a_new_answer_go_back_a_little(model: Model) -> None:
    talk = Talk(text(1, 300))
    talk.turn(model, [5, 6, 7], n=20)
    back = 2 if backend_of(model).can_step_back else BETWEEN + 32
    again = Talk(talk.tokens[:300])
    assert again.turn(model, [5, 6, 7], n=20) <= back
    assert again.tokens == talk.tokens
    edited = Talk(talk.tokens[:303])  # a template that drops what the model thought
    assert edited.turn(model, [9, 9, 9, 9], n=3) <= (2 if backend_of(model).can_step_back else 32)
    other = Talk(talk.tokens[:200])
    assert other.turn(model, [11] * 20) <= back
    empty(model)
    afresh = Talk(talk.tokens[:200])
    assert afresh.turn(model, [11] * 20) == 200
    assert other.tokens == afresh.tokens


def test_what_is_not_to_be_reused_leaves_the_others_alone(model: Model) -> None:
    talk = Talk(text(1, 100))
    talk.turn(model, [5, 6, 7])
    for _ in range(2):
        reply = model.generate(text(1, 100), temperature=0, max_tokens=2, cache_prompt=False)
        assert reply.timings["prompt_n"] == 100
    model.prompt_logprobs(text(2, 60))
    model.embed(text(3, 60), pooling="mean")
    assert talk.turn(model, [8, 9]) <= 2


def test_logits_that_are_at_hand_are_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "BETWEEN", 512)
    prompt = text(1, 100)
    for beginning in (prompt[:40], [*prompt, 5, 6, 7]):  # what is put away has a checkpoint in the prompt
        model.generate(beginning, max_tokens=1)
    model.prompt_logprobs(prompt)
    assert model.generate(prompt, max_tokens=1).timings["prompt_n"] == 0


def test_without_room_everything_is_computed_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_of(model).sequence.cache, "limit_bytes", 0)
    one, other = Talk(text(1, 100)), Talk(text(2, 100))
    one.turn(model, [5, 6])
    other.turn(model, [5, 6])
    assert one.turn(model, [7, 8]) >= 100
    assert len(backend_of(model).sequence.cache) == 0


def test_a_fallback_goes_back_in_its_own_text_only(model: Model) -> None:
    if not backend_of(model).can_step_back:
        with pytest.raises(mobile_gguf.UsageError, match="cannot be rolled back"):
            model.configure(mode="big-little", importance=CONFIDENCE)
        return
    one, other = Talk(text(1, 100), "big-little"), Talk(text(2, 100), "big-little")
    for i in range(3):
        one.turn(model, [5, i], n=6)
        other.turn(model, [6, i], n=6)
    empty(model)
    alone = Talk(text(1, 100), "big-little")
    for i in range(3):
        alone.turn(model, [5, i], n=6)
    assert alone.tokens == one.tokens


@pytest.mark.parametrize(("name", "most"), [(ATTENTION, 64), (HYBRID, 512)])
def test_two_long_conversations_that_alternate(name: str, most: int) -> None:
    with mobile_gguf.load(tiny_models.path(name), n_ctx=4096, threads=2, threads_batch=2) as long:
        pair = [Talk(text(i, 2000)) for i in range(2)]
        for at in range(20):
            n = pair[at % 2].turn(long, text(100 + at, 20))
            assert at < 2 or n <= most
        reply = long.generate(pair[0].tokens[:1800] + [7] * 9, max_tokens=1)  # an edit
        assert reply.timings["prompt_n"] <= 9 + most
