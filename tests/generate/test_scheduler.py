"""Several answers at once, over a made-up context: each is as it is alone, whoever comes, leaves or fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_decoder import FakeDecoder, answer, make

from mobile_gguf.engine.correction import Correction
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.engine.structs import LossCounters
from mobile_gguf.errors import AnswerStopped, ExpertReadError
from mobile_gguf.generate.context.wish import Wish
from mobile_gguf.generate.passes.decode import Pass, Policy
from mobile_gguf.generate.schedule.scheduler import Scheduler

EXACT, LITTLE, BOTH = Policy(), Policy("little", little_k=4), Policy("big-little", gamma=0.6, little_k=4)
LOSSY = Policy(loss=LossRules(drop=0.5))
OTHER = Policy("little", little_k=4, loss=LossRules(drop=0.25))


@dataclass
class Asker:
    """Asks for an answer, and keeps what came; ``leaves_after`` tokens it is gone."""

    prompt: list[int]
    n: int
    policy: Policy = EXACT
    leaves_after: int = 1 << 30
    came: list[tuple[int, Pass]] = field(default_factory=list)
    error: BaseException | None = None
    ended: bool = False
    at: list[int] = field(default_factory=list)  # decodes at which tokens came

    def work(self, scheduler: Scheduler, decoder: FakeDecoder) -> Callable[[], None]:
        def run() -> None:
            try:
                for made in answer(scheduler, self.prompt, self.n, self.policy, self.is_gone):
                    self.came.append(made)
                    self.at.append(decoder.n_passes)
            except Exception as error:
                self.error = error
            self.ended = True

        return run

    def is_gone(self) -> bool:
        return len(self.came) >= self.leaves_after


def together(scheduler: Scheduler, decoder: FakeDecoder, askers: list[Asker]) -> None:
    """Make the answers, as many at once as there may be."""
    waiting = list(askers)
    for _ in range(100_000):
        while waiting and scheduler.n_running < scheduler.most:
            scheduler.spawn(waiting.pop(0).work(scheduler, decoder))
        if not waiting and not scheduler.n_running:
            return
        scheduler.advance()
    raise AssertionError("the answers do not end")


def alone(asker: Asker, **settings: Any) -> list[tuple[int, Pass]]:
    scheduler, _, _ = make(1, **settings)
    return list(answer(scheduler, asker.prompt, min(asker.n, asker.leaves_after), asker.policy))


def askers_of(seed: int, n: int = 9) -> list[Asker]:
    chance = random.Random(seed)
    systems = [[chance.randrange(900) for _ in range(40)] for _ in range(2)]
    return [
        Asker(
            chance.choice([[], *systems]) + [chance.randrange(900) for _ in range(chance.randrange(1, 60))],
            chance.randrange(1, 40),
            chance.choice([EXACT, LITTLE, BOTH, LOSSY, OTHER]),
            chance.choice([1 << 30, 1 << 30, 5]),
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_apart", [False, True])
def test_each_answer_is_as_it_is_alone(seed: int, is_apart: bool) -> None:
    scheduler, decoder, _ = make(3, n_ctx=1024, is_apart=is_apart, cache_bytes=0)
    askers = askers_of(seed)
    together(scheduler, decoder, askers)
    for asker in askers:
        assert asker.error is None
        assert asker.came == alone(asker, n_ctx=1024)
    if is_apart:
        assert all(len(slices) == 1 for slices in decoder.passes)
    else:
        assert max(len(slices) for slices in decoder.passes) == 3


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("can_step_back", [True, False])
def test_a_context_that_is_too_small_for_all_is_shared_in_turn(
    seed: int, cache_bytes: int, can_step_back: bool
) -> None:
    """Who gives way comes back: with its own rows where they were kept, else they are computed again, big."""
    settings = {"n_ctx": 140, "can_step_back": can_step_back}
    scheduler, decoder, _ = make(4, cache_bytes, **settings)
    askers = askers_of(seed, 6)
    for asker in askers:
        if asker.policy not in (EXACT, LITTLE):
            asker.policy = EXACT
    together(scheduler, decoder, askers)
    for asker in askers:
        assert asker.error is None
        if asker.policy is EXACT:
            assert [token for token, _ in asker.came] == [token for token, _ in alone(asker, **settings)]


def test_prompts_come_in_slices_and_nobody_starves() -> None:
    scheduler, decoder, _ = make(4, n_ctx=4096)
    first = [Asker([i] * 5, 60) for i in range(3)]
    for asker in first:
        scheduler.spawn(asker.work(scheduler, decoder))
    for _ in range(6):
        scheduler.advance()
    newcomer = Asker([9] * 300, 3)
    scheduler.spawn(newcomer.work(scheduler, decoder))
    while not newcomer.came:
        scheduler.advance()
    # three tokens of the others fit beside its slice into each micro-batch
    slices = [slice_ for slices in decoder.passes for slice_ in slices if slice_.number == 3]
    assert max(len(slice_.tokens) for slice_ in slices) == 16 - 3
    assert all(len(slices) == 4 for slices in decoder.passes[-len(slices) :])
    for asker in first:
        gaps = [later - earlier for earlier, later in zip(asker.at, asker.at[1:], strict=False)]
        assert max(gaps) == 1
    scheduler.stop()


def test_parts_that_do_not_go_together_take_turns() -> None:
    scheduler, decoder, _ = make(3, n_ctx=1024)
    askers = [Asker([i] * 4, 30, policy) for i, policy in enumerate((LOSSY, OTHER, EXACT))]
    together(scheduler, decoder, askers)
    for asker in askers:
        assert asker.came == alone(asker, n_ctx=1024)
    both = [len({slice_.rules for slice_ in slices} - {None}) for slices in decoder.passes]
    assert max(both) == 1
    assert len(askers[2].at) == 30  # who has none goes with either


def test_what_goes_into_one_decode() -> None:
    _, _, sequences = make(2)
    rules, others = LossRules(drop=0.5), LossRules(drop=0.25)

    def goes(n: int, mine: dict[str, Any], its: dict[str, Any]) -> bool:
        one, other = Wish(sequences[0], [1], **mine), Wish(sequences[1], [1] * n, n, **its)
        assert one.goes_with(other) == other.goes_with(one)
        return one.goes_with(other)

    assert goes(1, {}, {"experts": 4})
    assert goes(9, {"rules": rules}, {})
    assert goes(1, {"rules": rules}, {"rules": rules})
    assert not goes(1, {"rules": rules}, {"rules": others})
    assert goes(1, {"rules": rules}, {"experts": 4})
    assert not goes(1, {"experts": 4, "mass": 8}, {"rules": rules})
    assert goes(1, {"experts": 4, "mass": 8}, {})
    one, other = (Correction(4, mass, *np.ones((2, 1, 1), np.float32)) for mass in (0, 6))
    assert not goes(1, {"experts": 4, "correction": one}, {"experts": 4})
    assert not goes(1, {"experts": 4, "correction": one}, {"experts": 4, "correction": other})
    assert goes(1, {"experts": 4, "correction": one}, {"experts": 4, "correction": one})
    assert goes(1, {"experts": 4, "correction": one}, {"correction": other})
    assert goes(1, {"keeps_state": True}, {})
    assert not goes(2, {"keeps_state": True}, {})


def test_an_error_is_that_of_those_whose_decode_it_was() -> None:
    scheduler, decoder, _ = make(2, n_ctx=1024)
    both, later = [Asker([i] * 4, 20) for i in range(2)], Asker([7] * 5, 20)
    decoder.errors = {9: ExpertReadError("no disk")}
    together(scheduler, decoder, [*both, later])
    for asker in both:
        assert isinstance(asker.error, ExpertReadError)
        assert asker.came == alone(asker, n_ctx=1024)[: len(asker.came)]
        assert len(asker.came) > 3
    assert later.error is None
    assert later.came == alone(later, n_ctx=1024)


def test_who_leaves_frees_the_place_and_nobody_notices() -> None:
    scheduler, decoder, sequences = make(2, n_ctx=1024)
    stays, leaves = Asker([1] * 4, 40), Asker([2] * 4, 40, leaves_after=3)
    last = Asker([3] * 200, 5)
    together(scheduler, decoder, [stays, leaves, last])
    assert leaves.ended
    assert len(leaves.came) == 3
    for asker in (stays, last):
        assert asker.came == alone(asker, n_ctx=1024)
    assert not any(sequence.is_taken for sequence in sequences)


def test_a_prompt_that_nobody_waits_for_ends_between_slices() -> None:
    scheduler, decoder, _ = make(2, n_ctx=1024)
    gone: list[bool] = []
    ended: list[BaseException] = []

    def work() -> None:
        try:
            next(answer(scheduler, [5] * 400, 3, EXACT, lambda: bool(gone)))
        except AnswerStopped as error:
            ended.append(error)

    scheduler.spawn(work)
    for _ in range(3):
        scheduler.advance()
    gone.append(True)
    scheduler.advance()
    assert ended
    assert scheduler.n_running == 0
    assert decoder.n_passes == 3


def test_a_ctrl_c_between_two_of_them_ends_all() -> None:
    scheduler, decoder, _ = make(3, n_ctx=1024)
    askers = [Asker([i] * 4, 40) for i in range(3)]
    for asker in askers:
        scheduler.spawn(asker.work(scheduler, decoder))
    wake, n = scheduler._wake, 0

    def struck(*given: Any, **more: Any) -> None:
        nonlocal n
        n += 1
        if n == 8:
            raise KeyboardInterrupt
        wake(*given, **more)

    scheduler._wake = struck
    with pytest.raises(KeyboardInterrupt):
        together(scheduler, decoder, [])
    scheduler.stop()
    assert scheduler.n_running == 0
    assert sum(isinstance(asker.error, AnswerStopped) for asker in askers) == 2


def test_what_all_cost_adds_up_to_what_was_counted() -> None:
    scheduler, decoder, _ = make(3, n_ctx=1024)
    spent = []

    def work(asker: Asker) -> Callable[[], None]:
        def run() -> None:
            sequence = None
            for _ in answer(scheduler, asker.prompt, asker.n, asker.policy):
                sequence = scheduler.sequence
            assert sequence is not None
            spent.append(sequence.traffic().host)

        return run

    scheduler.restart_counters()
    for i, policy in enumerate((EXACT, LITTLE, BOTH)):
        scheduler.spawn(work(Asker([i] * (5 + 9 * i), 12, policy)))
    while scheduler.n_running:
        scheduler.advance()
    for name in ("n_hits", "n_misses", "bytes_read"):
        assert sum(getattr(one, name) for one in spent) == getattr(decoder.counters, name)
    assert all(one.bytes_read > 0 for one in spent)


def test_what_each_lost_is_known_and_not_divided() -> None:
    """Two answers under the same rules are one decode; a budget of divergence asks what each token lost."""
    scheduler, decoder, _ = make(3, n_ctx=1024)
    found: dict[int, LossCounters] = {}

    def work(asker: Asker) -> Callable[[], None]:
        def run() -> None:
            for made in answer(scheduler, asker.prompt, asker.n, asker.policy):
                asker.came.append(made)
            found[asker.prompt[0]] = scheduler.sequence.traffic().loss

        return run

    scheduler.restart_counters()
    askers = [Asker([i] * 5, 12 + i, policy) for i, policy in enumerate((LOSSY, LOSSY, EXACT))]
    for asker in askers:
        scheduler.spawn(work(asker))
    while scheduler.n_running:
        scheduler.advance()
    assert max(sum(one.rules is not None for one in slices) for slices in decoder.passes) == 2
    for asker in askers[:2]:
        run = [token for token, _ in asker.came]
        assert found[asker.prompt[0]] == LossCounters(
            n_layers=2 * len(run),
            n_dropped=sum(token % 3 for token in run),
            moved_weight=sum(token % 7 / 8 for token in run),
        )
    assert found[2] == LossCounters()


def test_a_text_that_is_there_is_continued_in_its_sequence() -> None:
    scheduler, decoder, _ = make(3, n_ctx=1024)
    texts = [Asker([i] * 50, 10) for i in range(3)]
    together(scheduler, decoder, texts)
    n = decoder.n_passes
    again = [Asker(one.prompt + [token for token, _ in one.came], 2) for one in reversed(texts)]
    for asker in again:
        together(scheduler, decoder, [asker])
    run = sum(len(slice_.tokens) for slices in decoder.passes[n:] for slice_ in slices)
    assert run <= 3 * (2 + 2)
