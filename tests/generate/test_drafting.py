"""Answers whose tokens are drafted, over a made-up context: each is as it is without, whatever is guessed."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from fake_backend import hashed_logits
from fake_decoder import answer, make

from mobile_gguf.errors import ExpertReadError
from mobile_gguf.generate.passes.decode import ALL_EXPERTS, Policy
from mobile_gguf.generate.schedule.scheduler import Scheduler
from mobile_gguf.generate.speculation.drafting import Drafting
from mobile_gguf.generate.speculation.source import LookupSource, Offer, Source
from mobile_gguf.generate.speculation.tuner import MOST, Tuner

PROMPT = [ord(letter) for letter in "what is drafted is checked"]
LITTLE = Policy("little", little_k=4)


class Knowing:
    """Knows what the made-up model says, and tells it with errors: a token is right so often."""

    name = "knowing"

    def __init__(
        self, right: float, experts: int = ALL_EXPERTS, *, is_free: bool = False, seed: int = 1
    ) -> None:
        self.is_free = is_free
        self._chance = random.Random(seed)
        self._right = right
        self._experts = experts
        self._text: list[int] = []
        self._n_prompt = 0

    def add(self, tokens: Sequence[int]) -> None:
        self._n_prompt = self._n_prompt or len(tokens)
        self._text += tokens

    def offer(self, most: int) -> Offer:
        return Offer(most, self.name)

    def draft(self, n: int) -> list[int]:
        prompt, said = self._text[: self._n_prompt], self._text[self._n_prompt :]
        rows = [(token, ALL_EXPERTS) for token in prompt] + [(token, self._experts) for token in said]
        found: list[int] = []
        for _ in range(n):
            token = int(np.argmax(hashed_logits(rows)))
            found.append(token if self._chance.random() < self._right else ord("?"))
            rows.append((token, self._experts))
        return found


def fixed(n: int) -> Tuner:
    tuner = Tuner()
    tuner.fixed = n
    return tuner


def drafted(
    scheduler: Scheduler,
    prompt: list[int],
    n: int,
    source: Source,
    tuner: Tuner,
    policy: Policy = Policy(),  # noqa: B008
    cut: Callable[[list[int]], list[int]] = list,
    made: list[Drafting] | None = None,
) -> Generator[int, None, None]:
    """``n`` likeliest tokens after a prompt, some of them from drafts."""
    with scheduler.seated(prompt, policy.always_big) as sequence:
        sequence.policy, sequence.n_wanted = policy, n
        sequence.run_prompt(sequence.begin(prompt))
        drafting = Drafting(
            tuner,
            [source],
            sequence,
            run_single=sequence.run_token,
            draw=lambda: int(np.argmax(sequence.last_logits())),
            cut=cut,
            n_answers=lambda: max(1, scheduler.n_running),
        )
        if made is not None:
            made.append(drafting)
        with closing(drafting.tokens(prompt)) as tokens:
            for _ in range(n):
                yield next(tokens)


def plain(prompt: list[int], n: int, policy: Policy = Policy(), **settings: Any) -> list[int]:  # noqa: B008
    scheduler, _, _ = make(1, **settings)
    return [token for token, _ in answer(scheduler, prompt, n, policy)]


@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("length", range(1, MOST + 1))
def test_an_answer_is_the_same_for_every_length(right: float, length: int) -> None:
    scheduler, decoder, _ = make(1)
    made: list[Drafting] = []
    found = list(drafted(scheduler, PROMPT, 60, Knowing(right), fixed(length), made=made))
    assert found == plain(PROMPT, 60)
    record = made[0].record
    assert record.accepted <= record.drafted
    assert record.n_passes + record.n_single + record.accepted + 1 == 60
    if right == 1.0:
        assert record.accepted == record.drafted > 0
        assert decoder.n_passes < 60
    if right == 0.0:
        assert record.accepted == 0 < record.drafted


def test_rows_of_a_little_answer_are_not_taken_for_big_ones() -> None:
    scheduler, _, (sequence,) = make(1)
    expected = plain(PROMPT, 30, LITTLE)
    source = Knowing(0.9, LITTLE.little_k)
    found = list(drafted(scheduler, PROMPT, 30, source, fixed(4), LITTLE))
    assert found == expected
    assert sequence.n_usable([*PROMPT, *found], True) == len(PROMPT)
    assert sequence.n_usable([*PROMPT, *found], False) == len(PROMPT) + 29


def test_rows_of_an_exact_answer_are_built_on() -> None:
    scheduler, _, (sequence,) = make(1)
    found = list(drafted(scheduler, PROMPT, 30, Knowing(0.9), fixed(4)))
    assert sequence.n_usable([*PROMPT, *found], True) == len(PROMPT) + 29


def test_the_text_itself_is_drafted_from() -> None:
    """The made-up model depends on all rows, so that it has no echoes: the prompt has its answer."""
    said = plain(PROMPT, 8)
    echo = [*said, *PROMPT]
    scheduler, _, _ = make(1)
    made: list[Drafting] = []
    assert list(drafted(scheduler, echo, 20, LookupSource(), fixed(6), made=made)) == plain(echo, 20)
    assert made[0].record.source == "ngram"


def test_nothing_is_drafted_beyond_what_is_wanted_or_has_room() -> None:
    for n, n_ctx in ((7, 256), (40, len(PROMPT) + 40)):
        scheduler, decoder, _ = make(1, n_ctx=n_ctx)
        assert list(drafted(scheduler, PROMPT, n, Knowing(1.0), fixed(8))) == plain(PROMPT, n)
        assert sum(len(one.tokens) for passed in decoder.passes for one in passed) == len(PROMPT) + n - 1


def test_a_draft_is_cut_by_what_may_come() -> None:
    scheduler, _, _ = make(1)
    made: list[Drafting] = []
    cut: Callable[[list[int]], list[int]] = lambda draft: draft[:2]  # noqa: E731
    found = list(drafted(scheduler, PROMPT, 30, Knowing(1.0), fixed(6), cut=cut, made=made))
    assert found == plain(PROMPT, 30)
    assert made[0].record.mean_length <= 2
    made.clear()
    list(drafted(scheduler, PROMPT, 9, Knowing(1.0), fixed(6), cut=lambda _draft: [], made=made))
    assert made[0].record.n_passes == made[0].record.drafted == 0
    assert made[0].record.utility_predicted is None


@pytest.mark.parametrize("after", range(1, 12))
def test_who_leaves_in_the_middle_of_a_draft_leaves_a_right_text(after: int) -> None:
    scheduler, decoder, (sequence,) = make(1)
    with closing(drafted(scheduler, PROMPT, 40, Knowing(0.8), fixed(4))) as tokens:
        said = [next(tokens) for _ in range(after)]
    assert sequence.tokens == [*PROMPT, *said][: len(PROMPT) + after - 1]
    assert decoder.n_cells == len(sequence.tokens)
    longer = [*PROMPT, *said, ord("!")]
    again = [token for token, _ in answer(scheduler, longer, 10, Policy())]
    assert again == plain(longer, 10)


@pytest.mark.parametrize("at", range(3, 9))  # the prompt takes two
def test_a_pass_that_fails_leaves_a_right_text(at: int) -> None:
    scheduler, decoder, (sequence,) = make(1)
    decoder.errors[at] = ExpertReadError("a read failed")
    with pytest.raises(ExpertReadError):
        list(drafted(scheduler, PROMPT, 60, Knowing(0.7), fixed(3)))
    assert sequence.tokens[: len(PROMPT)] == PROMPT
    longer = [*sequence.tokens, ord("!")]
    assert [token for token, _ in answer(scheduler, longer, 10, Policy())] == plain(longer, 10)
    assert list(drafted(scheduler, PROMPT, 30, Knowing(0.7), fixed(3))) == plain(PROMPT, 30)


@pytest.mark.parametrize("seed", range(4))
def test_several_drafts_are_checked_in_one_decode(seed: int) -> None:
    chance = random.Random(seed)
    scheduler, decoder, _ = make(4, n_ctx=1024, n_batch=32, n_ubatch=32)
    prompts = [[chance.randrange(97, 123) for _ in range(chance.randrange(2, 30))] for _ in range(4)]
    came: list[list[int]] = [[] for _ in prompts]

    def work(i: int) -> Callable[[], None]:
        def run() -> None:
            source = Knowing(0.8, seed=i)
            came[i] += drafted(scheduler, prompts[i], 40, source, fixed(chance.randrange(0, 7)))

        return run

    for i in range(4):
        scheduler.spawn(work(i))
    while scheduler.n_running:
        scheduler.advance()
    assert came == [plain(prompt, 40, n_ctx=1024, n_batch=32, n_ubatch=32) for prompt in prompts]
    assert any(sum(len(one.tokens) > 1 for one in passed) > 1 for passed in decoder.passes)


def test_a_draft_that_a_decode_has_no_room_for_is_cut() -> None:
    scheduler, decoder, _ = make(3, n_ctx=1024, n_batch=8, n_ubatch=8)
    came: list[list[int]] = [[] for _ in range(3)]

    def work(i: int) -> Callable[[], None]:
        return lambda: came[i].extend(drafted(scheduler, [*PROMPT, i], 30, Knowing(1.0), fixed(6)))

    for i in range(3):
        scheduler.spawn(work(i))
    while scheduler.n_running:
        scheduler.advance()
    assert came == [plain([*PROMPT, i], 30, n_ctx=1024, n_batch=8, n_ubatch=8) for i in range(3)]
    assert max(sum(len(one.tokens) for one in passed) for passed in decoder.passes) <= 8


@pytest.mark.parametrize("n_ctx", [2 * (len(PROMPT) + 31) + 8, len(PROMPT) + 31 + 8])
def test_a_full_context_of_several_goes_on(n_ctx: int) -> None:
    """Rows of wrong guesses do not stay in cells that others need; who gives way comes back."""
    settings = {"n_ctx": n_ctx, "n_batch": 16}
    scheduler, decoder, _ = make(2, **settings)
    came: list[list[int]] = [[], []]

    def work(i: int) -> Callable[[], None]:
        return lambda: came[i].extend(drafted(scheduler, [*PROMPT, i], 30, Knowing(0.5, seed=i), fixed(7)))

    for i in range(2):
        scheduler.spawn(work(i))
    while scheduler.n_running:
        scheduler.advance()
        assert decoder.n_cells <= settings["n_ctx"]
    assert came == [plain([*PROMPT, i], 30, n_batch=16) for i in range(2)]


def test_a_row_that_is_gone_is_run_again() -> None:
    """Another decode between two tokens of a draft takes the logits away; the answer goes on all the same."""
    scheduler, _, (one, other) = make(2)
    found = []
    with closing(drafted(scheduler, PROMPT, 20, Knowing(1.0), fixed(6))) as tokens:
        for i in range(20):
            found.append(next(tokens))
            if i == 3:
                free = one if not one.is_taken else other
                free.run_prompt(free.begin([1, 2, 3]))
    assert found == plain(PROMPT, 20)


def test_drafts_are_compared_where_they_are_not_run() -> None:
    tuner = fixed(0)
    scheduler, decoder, _ = make(1)
    list(drafted(scheduler, PROMPT, 60, Knowing(1.0, is_free=True), tuner))
    assert tuner.acceptance.at("knowing", 0) > 0.8
    assert len(decoder.passes) >= 60
    list(drafted(scheduler, PROMPT, 60, Knowing(0.0, is_free=True), tuner))
    assert tuner.acceptance.at("knowing", 0) < 0.2


def test_guesses_of_a_sequence_leave_no_rows() -> None:
    _, decoder, (sequence,) = make(1)
    sequence.run_prompt(sequence.begin(PROMPT))
    n = decoder.n_cells
    sequence.run_guess(ord("a"), 4)
    assert decoder.passes[-1][0].experts == 4
    sequence.keep(n)
    sequence.run_token(ord("b"))
    assert decoder.n_cells == n + 1
    assert sequence.n_usable([*PROMPT, ord("b"), 0], True) == n + 1


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("length", [1, 3, MOST])
def test_a_memory_that_cannot_be_rolled_back_goes_to_what_it_was(right: float, length: int) -> None:
    """What was right of a draft is run again with the next token, in one pass."""
    scheduler, decoder, (sequence,) = make(1, can_step_back=False)
    tuner = fixed(length)
    tuner.runs_again = True
    made: list[Drafting] = []
    said = list(drafted(scheduler, PROMPT, 60, Knowing(right), tuner, made=made))
    assert said == plain(PROMPT, 60)
    record = made[0].record
    n_prompt = -(-len(PROMPT) // 16)
    assert len(decoder.passes) == n_prompt + record.n_passes + record.n_single
    longer = [*PROMPT, *said, ord("!")]
    assert [token for token, _ in answer(scheduler, longer, 10, Policy())] == plain(longer, 10)
    assert [*sequence.tokens] == [*longer, *plain(longer, 10)]


@pytest.mark.parametrize("after", range(1, 9))
def test_who_leaves_such_a_memory_in_the_middle_of_a_draft_leaves_a_right_text(after: int) -> None:
    scheduler, _, _ = make(1, can_step_back=False)
    tuner = fixed(4)
    tuner.runs_again = True
    with closing(drafted(scheduler, PROMPT, 40, Knowing(0.7), tuner)) as tokens:
        said = [next(tokens) for _ in range(after)]
    longer = [*PROMPT, *said, ord("!")]
    assert list(drafted(scheduler, longer, 20, Knowing(0.7), tuner)) == plain(longer, 20)


def test_without_room_for_what_it_was_nothing_is_drafted() -> None:
    scheduler, decoder, _ = make(1, cache_bytes=0, can_step_back=False)
    tuner = fixed(4)
    tuner.runs_again = True
    assert list(drafted(scheduler, PROMPT, 20, Knowing(1.0), tuner)) == plain(PROMPT, 20)
    assert all(not one[0].is_drafted for one in decoder.passes)


def test_drafts_stay_within_a_micro_batch() -> None:
    """What was refused is taken back of one only."""
    scheduler, decoder, _ = make(4, n_ctx=1024, n_batch=64, n_ubatch=8)
    came: list[list[int]] = [[] for _ in range(4)]

    def work(i: int) -> Callable[[], None]:
        return lambda: came[i].extend(drafted(scheduler, [*PROMPT, i], 20, Knowing(0.8), fixed(6)))

    for i in range(4):
        scheduler.spawn(work(i))
    while scheduler.n_running:
        scheduler.advance()
    assert came == [plain([*PROMPT, i], 20, n_ctx=1024, n_batch=64, n_ubatch=8) for i in range(4)]
    for passed in decoder.passes:
        assert not any(one.is_drafted for one in passed) or sum(len(one.tokens) for one in passed) <= 8


class OfKinds(Knowing):
    """Says of each second token that its drafts are of another kind."""

    def offer(self, most: int) -> Offer:
        return Offer(most, "even" if len(self._text) % 2 == 0 else "odd")


def test_each_kind_is_held_against_what_is_said() -> None:
    """All that is on offer is compared, whatever is being compared already: of both kinds as much is seen."""
    scheduler, _, _ = make(1)
    tuner, seen = fixed(0), []
    tuner.saw = lambda kind, place, is_taken: seen.append((kind, place, is_taken))  # type: ignore[method-assign]
    list(drafted(scheduler, PROMPT, 40, OfKinds(1.0, is_free=True), tuner))
    first = [kind for kind, place, _ in seen if place == 0]
    assert abs(first.count("even") - first.count("odd")) <= 1
    assert len(first) >= 36
    assert all(is_taken for *_, is_taken in seen)
