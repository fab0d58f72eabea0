"""Whatever comes when: arrivals, lengths, modes, forks, edits, cancels and failed reads, by chance.

Over a made-up context, whose logits hang on every row of a text and on what wrote it: an answer that all
experts make has to be the one that it is alone, whatever it goes on with.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_decoder import FakeDecoder, answer, make

from mobile_gguf.engine.loss import LossRules
from mobile_gguf.errors import AnswerStopped, ExpertReadError
from mobile_gguf.generate.context import cells
from mobile_gguf.generate.passes.decode import Pass, Policy
from mobile_gguf.generate.schedule.scheduler import Scheduler

EXACT, LITTLE, BOTH = Policy(), Policy("little", little_k=4), Policy("big-little", gamma=0.6, little_k=4)
LOSSY = Policy(loss=LossRules(drop=0.5))
N_ANSWERS, NEVER = 16, 1 << 30


@dataclass
class Turn:
    """An answer that somebody asks for; ``kind`` says what its prompt has to do with those before."""

    kind: str
    prompt: list[int]
    n: int
    policy: Policy
    leaves_after: int  # tokens
    leaves_at: int  # decodes
    came: list[tuple[int, Pass]] = field(default_factory=list)
    error: BaseException | None = None
    ended: bool = False

    def work(self, scheduler: Scheduler, decoder: FakeDecoder) -> Callable[[], None]:
        def is_gone() -> bool:
            return len(self.came) >= self.leaves_after or decoder.n_passes >= self.leaves_at

        def run() -> None:
            try:
                for made in answer(scheduler, self.prompt, self.n, self.policy, is_gone):
                    self.came.append(made)
            except (ExpertReadError, AnswerStopped) as error:
                self.error = error
            self.ended = True

        return run

    @property
    def text(self) -> list[int]:
        return self.prompt + [token for token, _ in self.came]


class Crowd:
    """Those who ask, one after another."""

    def __init__(self, seed: int, policies: list[Policy]) -> None:
        self.chance = random.Random(seed)
        self.policies = policies
        self.systems = [self.words(40) for _ in range(2)]
        self.turns: list[Turn] = []

    def words(self, n: int) -> list[int]:
        return [self.chance.randrange(900) for _ in range(n)]

    def next(self, n_passes: int) -> Turn:
        chance = self.chance
        kinds = ["new", "fork", "edit", "again", "goes on"]
        kind = chance.choice(kinds if self.turns else ["new"])
        question = self.words(chance.randrange(1, 40))
        if kind == "new":
            prompt = chance.choice([[], *self.systems]) + question
        else:
            other = chance.choice(chance.choice([self.turns, self.turns[-2:]]))
            prompt = {
                "fork": other.text[: chance.randrange(1, len(other.text) + 1)] + question,
                "edit": other.prompt[: -chance.randrange(1, 40)] + question,
                "again": other.prompt,
                "goes on": other.text + question,
            }[kind]
        turn = Turn(
            kind, prompt[:140], chance.randrange(1, 30), chance.choice(self.policies),
            chance.choice([NEVER, NEVER, chance.randrange(1, 9)]),
            chance.choice([NEVER, NEVER, n_passes + chance.randrange(9)]),
        )  # fmt: skip
        self.turns.append(turn)
        return turn


def crowded(seed: int, policies: list[Policy], settings: dict[str, Any]) -> tuple[Crowd, FakeDecoder]:
    """Have them all answered; now and then a read fails."""
    crowd = Crowd(seed, policies)
    scheduler, decoder, sequences = make(4, **settings)
    for _ in range(20_000):
        is_room = scheduler.n_running < scheduler.most and len(crowd.turns) < N_ANSWERS
        if is_room and (not scheduler.n_running or crowd.chance.random() < 0.3):
            scheduler.spawn(crowd.next(decoder.n_passes).work(scheduler, decoder))
        if crowd.chance.random() < 0.02:
            decoder.errors[decoder.n_passes + 1] = ExpertReadError("no disk")
        scheduler.advance()
        if len(crowd.turns) == N_ANSWERS and not scheduler.n_running:
            assert not any(sequence.is_taken for sequence in sequences)
            return crowd, decoder
    raise AssertionError("the answers do not end")


SETTINGS = {
    "room for all": {"n_ctx": 4096},
    "too small for all": {"n_ctx": 200},
    "nothing is kept": {"n_ctx": 200, "cache_bytes": 0},
    "each its own": {"n_ctx": 4096, "is_apart": True},
    "hybrid": {"n_ctx": 4096, "can_step_back": False},
    "hybrid, too small for all": {"n_ctx": 200, "can_step_back": False},
    "hybrid, each its own": {"n_ctx": 4096, "can_step_back": False, "is_apart": True},
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("where", SETTINGS)
def test_an_exact_answer_is_as_it_is_alone_whatever_happens(
    where: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "BETWEEN", 40)
    settings = SETTINGS[where]
    goes_back = bool(settings.get("can_step_back", True))
    policies = [EXACT, EXACT, LITTLE, LOSSY, *([BOTH] if goes_back else [])]
    crowd, decoder = crowded(seed, policies, settings)
    for turn in crowd.turns:
        n_asked = min(turn.n, turn.leaves_after)
        assert turn.ended
        assert len(turn.came) == n_asked or turn.error is not None or turn.leaves_at < NEVER
        if turn.policy is EXACT:
            scheduler, _, _ = make(1, n_ctx=4096, can_step_back=goes_back)
            alone = list(answer(scheduler, turn.prompt, n_asked, EXACT))
            assert turn.came == alone[: len(turn.came)]
    if settings.get("is_apart"):
        assert all(len(slices) == 1 for slices in decoder.passes)


def test_all_that_may_happen_does() -> None:
    """Or the test above shows less than it says."""
    turns = [
        turn
        for seed in range(8)
        for turn in crowded(seed, [EXACT, LITTLE, LOSSY, BOTH], SETTINGS["room for all"])[0].turns
    ]
    assert {turn.kind for turn in turns} == {"new", "fork", "edit", "again", "goes on"}
    assert {type(turn.error) for turn in turns} == {type(None), ExpertReadError, AnswerStopped}
    assert any(turn.came for turn in turns if isinstance(turn.error, ExpertReadError))
    assert any(len(turn.came) == turn.leaves_after < turn.n for turn in turns)
    assert any(turn.policy is BOTH and Pass.FALLBACK in dict(turn.came).values() for turn in turns)
    lengths = [len(turn.prompt) for turn in turns]
    assert min(lengths) < 10 < 90 < max(lengths)


def test_a_checkpoint_is_of_the_text_that_goes_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two edits: at the place of the second one there was a checkpoint of the text before the first."""
    monkeypatch.setattr(cells, "BETWEEN", 40)
    crowd, settings = Crowd(1, []), {"n_ctx": 1024, "can_step_back": False}
    first = crowd.words(130)
    second = first[:70] + crowd.words(70)
    scheduler, decoder, _ = make(1, **settings)
    for prompt, n_most in ((first, 130), (second, 140), (second[:132] + crowd.words(10), 100)):
        had = decoder.n_passes
        found = list(answer(scheduler, prompt, 3, EXACT))
        run = sum(len(one.tokens) for slices in decoder.passes[had:] for one in slices) - 3
        assert run <= n_most
        alone, _, _ = make(1, **settings)
        assert found == list(answer(alone, prompt, 3, EXACT))
