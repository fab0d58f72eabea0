"""How long drafts are, on made-up machines: near the best length, and never much slower than without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import pytest
from fake_backend import fake_info

from mobile_gguf.generate.speculation.costs import UNION, Step, StepCosts
from mobile_gguf.generate.speculation.drafting import Drafting
from mobile_gguf.generate.speculation.source import Offer
from mobile_gguf.generate.speculation.stated import block_takes, model_takes, token_bytes
from mobile_gguf.generate.speculation.tuner import FIRST_PAUSE, LAST_PAUSE, MOST, TRIAL, Tuner
from mobile_gguf.gguf.experts import ExpertLayer


@dataclass
class Machine:
    """What passes take here, and how often a drafted token is right."""

    right: float = 0.8
    single: float = 0.02
    slope: float = 0.5  # of another token, in single ones
    jump: float = 0.0
    waits: float = 0.0  # for bytes, in single ones
    drafting: float = 0.0  # of a drafted token, in single ones
    anew: float = 0.0  # over another number of tokens than before, more than single ones
    noise: float = 0.05
    seed: int = 1

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.rights: list[bool] = []
        self.n_before = 0
        self.plain = 0.0  # what the tokens that it made would have taken one by one

    def step(self, n: int) -> Step:
        noise = self.chance.uniform(1 - self.noise, 1 + self.noise)
        n_before, self.n_before = self.n_before, n
        computed = self.jump + self.slope * (n - 1) if n > 1 else 0.0
        computed = self.single * (1 + computed + self.anew * (n_before != n)) * noise
        waited = self.single * self.waits * n**UNION * noise
        return Step(n, computed + waited, waited, int(1e9 * waited), round(100 * n**UNION), n_before)

    def exactly(self, n: int) -> float:
        more = self.jump + self.slope * (n - 1) if n > 1 else 0
        return self.single * (1 + more + self.waits * n**UNION)

    def utility(self, n: int) -> float:
        """What drafts of ``n`` are worth, as the machine is."""
        tokens = sum(self.right**i for i in range(n + 1))
        return tokens * self.exactly(1) / (self.exactly(n + 1) + n * self.drafting * self.single)

    def is_right(self, place: int) -> bool:
        """Whether what is drafted of a text's token is right, if what is before it is."""
        while len(self.rights) <= place:
            self.rights.append(self.chance.random() < self.right)
        return self.rights[place]


class Made:
    """A text that is made on a machine: its tokens are their places, what is run of it takes time."""

    n_wanted = n_left = 1 << 30
    owed: list[int] = []  # noqa: RUF012

    def __init__(self, tuner: Tuner, machine: Machine) -> None:
        self.tuner = tuner
        self.machine = machine
        self.place = len(machine.rights)
        self.now = 0.0

    def run(self, n: int) -> None:
        step = self.machine.step(n)
        self.tuner.costs.observe(step)
        self.now += step.seconds

    def run_single(self, token: int) -> None:
        self.run(1)

    def run_drafted(self, token: int, draft: Sequence[int]) -> None:
        self.run(1 + len(draft))

    def draw(self) -> int:
        self.place += 1
        return self.place - 1

    def hold(self) -> bool:
        return True

    def accept(self, token: int) -> bool:
        return True

    def drop_draft(self) -> None:
        """There are no rows."""


class Guesses:
    """Drafts of such a text."""

    def __init__(self, made: Made, kind: str, *, is_free: bool) -> None:
        self.name = kind
        self.is_free = is_free
        self._made = made

    def add(self, tokens: Sequence[int]) -> None:
        """It knows the text."""

    def offer(self, most: int) -> Offer:
        return Offer(most, self.name)

    def draft(self, n: int) -> list[int]:
        made, machine = self._made, self._made.machine
        if not self.is_free:
            made.now += n * machine.drafting * machine.single
        return [i if machine.is_right(i) else -1 for i in range(made.place, made.place + n)]


def play(tuner: Tuner, machine: Machine, n_tokens: int, kind: str = "k", *, is_free: bool = False) -> float:
    """Make an answer of so many tokens; returns the seconds."""
    made = Made(tuner, machine)
    source = Guesses(made, kind, is_free=is_free)
    tuner.begin()
    drafting = Drafting(
        tuner, [source], made, run_single=made.run_single, draw=made.draw, cut=list, clock=lambda: made.now
    )
    with closing(drafting.tokens([0])) as tokens:
        for _ in range(n_tokens + 1):  # of the first its prompt gives the logits
            next(tokens)
    machine.plain += n_tokens * machine.exactly(1)
    return made.now


def plain(machine: Machine, n_tokens: int) -> float:
    return sum(machine.step(1).seconds for _ in range(n_tokens))


MACHINES = [
    Machine(right=right, slope=slope, jump=jump, waits=waits, drafting=drafting, seed=i)
    for i, (right, slope, jump, waits, drafting) in enumerate(
        [
            (0.95, 0.3, 0.0, 0.0, 0.0),
            (0.9, 0.1, 0.2, 0.0, 0.0),
            (0.8, 0.6, 0.0, 0.0, 0.0),
            (0.5, 0.2, 0.0, 0.0, 0.0),
            (0.3, 0.6, 0.1, 0.0, 0.0),
            (0.0, 0.6, 0.0, 0.0, 0.0),
            (0.9, 0.6, 0.0, 3.0, 0.0),
            (0.7, 0.6, 0.0, 3.0, 0.0),
            (0.9, 0.2, 0.0, 0.0, 0.6),
            (0.9, 0.05, 0.0, 0.0, 0.1),
        ]
    )
]


@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_it_is_never_much_slower_than_without(machine: Machine, is_free: bool) -> None:
    for n_tokens in (200, 2000):
        seconds = play(Tuner(), machine, n_tokens, is_free=is_free)
        assert seconds <= plain(machine, n_tokens) / 0.95


# what changes in mid-answer: the speed, what several tokens take beside one, how much is right
CHANGES = {
    "three times as slow": {"single": 0.06},
    "three times as fast": {"single": 0.007},
    "several tokens become dear": {"slope": 1.0},
    "dear, and slow for all": {"slope": 1.0, "single": 0.05},
    "dear, and quick for one": {"slope": 1.1, "single": 0.008},
    "a disk becomes slow": {"waits": 4.0},
    "nothing is right any more": {"right": 0.0},
    "little is right any more": {"right": 0.3},
}


@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_machine_that_changes_makes_no_answer_much_slower(changes: dict[str, float], is_free: bool) -> None:
    """Drafts pay, and then all is another way: what comes is held against the same tokens without drafts."""
    for seed in range(2):
        machine, tuner = Machine(right=0.9, slope=0.3, seed=seed), Tuner()
        play(tuner, machine, 200, is_free=is_free)
        for name, value in changes.items():
            setattr(machine, name, value)
        machine.plain = 0.0
        assert play(tuner, machine, 800, is_free=is_free) <= machine.plain / 0.95


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_length_is_near_the_best(machine: Machine) -> None:
    tuner, found, is_free = Tuner(), [], not machine.drafting
    play(tuner, machine, 1000, is_free=is_free)
    best = max(machine.utility(n) for n in range(MOST + 1))
    for _ in range(5):
        play(tuner, machine, 100, is_free=is_free)
        n, utility = tuner.best("k", MOST, "k")
        found.append(machine.utility(n) if utility > 1.03 else 1.0)
    assert sum(found) / 5 >= (0.95 if best > 1.1 else 0.9) * best


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_what_a_pass_takes_is_foreseen(machine: Machine) -> None:
    tuner = Tuner()
    for n in (*range(1, 10), *range(1, 10), 1, 1, 1):
        tuner.costs.observe(machine.step(n))
    for n in range(1, 10):
        assert tuner.costs.seconds_of(n) == pytest.approx(machine.exactly(n), rel=0.15)
        assert tuner.costs.needs_of(n) == pytest.approx(100 * n**UNION, rel=0.15)
        assert tuner.costs.bytes_of(n) == pytest.approx(
            1e9 * machine.waits * machine.single * n**UNION, rel=0.15
        )


# the demo's passes on one processor (docs/speculation.md), and some that cost less
FIRST_ANSWERS = [(1.0, 0.55), (0.97, 0.5), (0.95, 0.6), (0.97, 0.3), (1.0, 0.2)]


@pytest.mark.parametrize(("right", "slope"), FIRST_ANSWERS)
def test_the_first_answer_is_near_the_best_of_a_sweep(right: float, slope: float) -> None:
    """A file that is there a second time, and nothing is known yet but that the matches are long."""

    def seconds(fixed: int | None) -> float:
        total = 0.0
        for seed in range(16):
            tuner = Tuner()
            tuner.fixed = fixed
            machine = Machine(right=right, slope=slope, seed=seed)
            total += play(tuner, machine, 128, "ngram 8+", is_free=True)
        return total

    assert seconds(None) <= min(map(seconds, range(MOST + 1))) / 0.95


# A small model of many layers, whose graph takes a seventh of a token to build (docs/speculation.md).
ANEW = [(0.65, 0.3), (0.5, 0.3), (0.8, 0.6), (0.65, 0.6), (0.5, 0.6), (0.8, 0.8)]


@pytest.mark.parametrize(("right", "slope"), ANEW)
def test_what_another_number_of_tokens_takes_is_the_drafts(right: float, slope: float) -> None:
    """Single tokens between drafts take more than those that nothing is drafted of: they are no measure."""
    total = taken = 0.0
    singles, anew = [], []
    for seed in range(16):
        machine, tuner = Machine(right=right, slope=slope, anew=0.14, seed=seed), Tuner()
        taken += play(tuner, machine, 192, is_free=True)
        total += machine.plain
        singles.append(tuner.costs.seconds_of(1) / machine.single)
        anew.append(tuner.costs.anew_seconds / machine.single)
    if slope > 0.5:  # elsewhere drafts pay so well that hardly two single ones come in a row
        assert sum(singles) / 16 == pytest.approx(1.0, rel=0.05)
        assert sum(anew) / 16 == pytest.approx(0.14, rel=0.35)
    assert taken <= total / 0.97


def test_a_draft_as_long_as_the_last_one_builds_nothing_anew() -> None:
    tuner, machine = Tuner(), Machine(slope=0.5, anew=0.3, noise=0.0)
    for n in (1, 1, 3, 1, 1, 3, 1, 1, 3, 1, 1, 2, 1, 1, 3):
        tuner.costs.observe(machine.step(n))
    for _ in range(30):
        for place in range(2):
            tuner.saw("k", place, True)
    after_its_like = tuner.utility("k", 2)
    tuner.costs.observe(machine.step(1))
    assert after_its_like > 1.1 * tuner.utility("k", 2)
    tuner.costs.observe(machine.step(2))
    assert after_its_like > 1.1 * tuner.utility("k", 2)


def test_it_is_found_out_what_another_number_of_tokens_takes() -> None:
    """Behind the first drafts two tokens are run singly, of which the first has what the second has not."""
    tuner, machine, lengths = Tuner(), Machine(right=1.0, slope=0.7, anew=0.14, noise=0.0), []
    for _ in range(40):
        n = tuner.length("k", 1)
        lengths.append(n)
        tuner.costs.observe(machine.step(n + 1))
        if n:
            tuner.saw("k", 0, True)
            tuner.tried("k")
            tuner.ran("k", n, n, 0.02)
        else:
            tuner.ran_single(0.02)
    assert tuner.costs.anew_seconds > 0
    singles = [i for i, n in enumerate(lengths) if not n]
    assert any(later == one + 1 for one, later in pairwise(singles[2:]))


def test_trials_of_what_is_free_to_guess_are_of_the_machine() -> None:
    """What passes take is the same for all kinds of a source: one trial does for all of them."""

    def n_tried(source: str | None) -> int:
        machine, tuner, n_tried = Machine(slope=0.7, noise=0.0), Tuner(), 0
        for n in (1, 1, 1, 2, 2, 2):
            tuner.costs.observe(machine.step(n))
        for i in range(900):
            kind = ("2+", "4+", "8+")[i % 3]
            n = tuner.length(kind, MOST, source or kind, is_free=True)
            tuner.saw(kind, 0, i // 3 % 2 == 0)
            tuner.costs.observe(machine.step(n + 1))
            if n:
                n_tried += 1
                tuner.tried(kind)
                tuner.ran(source or kind, n, 0, machine.exactly(n + 1))
            else:
                tuner.ran_single(machine.exactly(1))
        return n_tried

    assert 0 < n_tried("a") < n_tried(None) / 2


def test_a_machine_that_pays_is_used() -> None:
    machine = Machine(right=0.95, slope=0.2)
    assert play(Tuner(), machine, 1000, is_free=True) < plain(machine, 1000) / 1.6
    assert play(Tuner(), machine, 1000) < plain(machine, 1000) / 1.6


def test_what_does_not_pay_is_tried_more_and_more_rarely() -> None:
    machine, tuner, tried = Machine(right=0.0, slope=0.9), Tuner(), []
    tuner.costs.observe(machine.step(1))
    for i in range(6000):
        n = tuner.length("k", MOST)
        if n:
            tried.append(i)
            tuner.saw("k", 0, False)
            tuner.costs.observe(machine.step(n + 1))
            tuner.tried("k")
            tuner.ran("k", n, 0, machine.step(n + 1).seconds)
        else:
            tuner.costs.observe(machine.step(1))
            tuner.ran_single(machine.step(1).seconds)
    pauses = [later - one - 1 for one, later in pairwise(tried) if later - one > TRIAL]
    assert pauses[0] >= FIRST_PAUSE - 1
    assert pauses[-1] >= LAST_PAUSE - 1
    assert len(tried) < 40


def test_it_comes_back_when_it_pays_again() -> None:
    tuner, machine = Tuner(), Machine(right=0.0, slope=0.2)
    play(tuner, machine, 300, is_free=True)
    assert tuner.length("k", MOST, is_free=True) == 0
    machine.right = 0.95
    play(tuner, machine, 100, is_free=True)
    assert tuner.best("k", MOST)[1] > 1.5


def test_a_kind_that_pays_is_drafted_beside_one_that_does_not() -> None:
    tuner = Tuner()
    good, bad = Machine(right=0.95, slope=0.2), Machine(right=0.05, slope=0.2)
    for _ in range(20):
        play(tuner, good, 20, "good", is_free=True)
        play(tuner, bad, 20, "bad", is_free=True)
    assert tuner.best("good", MOST)[0] >= 4
    assert tuner.best("good", MOST)[1] > 1.4
    assert tuner.best("bad", MOST)[1] < 1.0


def test_a_single_token_shows_now_and_then_what_it_takes() -> None:
    tuner, machine = Tuner(), Machine(right=1.0, slope=0.1)
    lengths = []
    for _ in range(100):
        n = tuner.length("k", MOST)
        lengths.append(n)
        tuner.costs.observe(machine.step(n + 1))
        if n:
            tuner.saw("k", 0, True)
            tuner.tried("k")
            tuner.ran("k", n, n, machine.step(n + 1).seconds)
        else:
            tuner.ran_single(machine.step(1).seconds)
    assert 5 <= lengths.count(0) <= 12


def test_of_several_answers_the_passes_of_all_count() -> None:
    """Where another token costs what a single one does, nothing is won; where it is nearly free, much."""
    dear, cheap = Tuner(), Tuner()
    for tuner, slope in ((dear, 0.95), (cheap, 0.02)):
        machine = Machine(slope=slope, noise=0.0)
        for n in (1, 2, 4, 8, 16, 24) * 6:
            tuner.together.observe(machine.step(n))
        for place in range(3):
            for _ in range(50):
                tuner.saw("k", place, True)
    assert dear.utility("k", 3, n_answers=8) < 1.1
    assert cheap.utility("k", 3, n_answers=8) > 2.0
    assert cheap.length("k", 3, n_answers=8) == 3


def test_a_length_that_is_fixed_stays() -> None:
    tuner = Tuner()
    tuner.fixed = 5
    assert [tuner.length("k", most) for most in (0, 3, 8)] == [0, 3, 5]
    tuner.fixed = 0
    assert tuner.length("k", 8) == 0


def test_nothing_is_drafted_before_it_is_known_what_passes_take() -> None:
    tuner = Tuner()
    assert tuner.length("k", MOST) == 0


def test_a_pass_that_something_else_held_up_is_not_believed() -> None:
    costs = StepCosts()
    for _ in range(10):
        costs.observe(Step(1, 0.02))
    costs.observe(Step(1, 5.0))
    assert costs.seconds_of(1) < 0.03
    costs.observe(Step(3, 9.0))
    assert costs.seconds_of(3) < 0.1


def test_a_draft_is_cut_where_its_experts_would_drop_each_other() -> None:
    tuner, machine = Tuner(), Machine(right=1.0, slope=0.02, noise=0.0)
    play(tuner, machine, 200, is_free=True)
    tuner.ran_single(0.02)
    assert tuner.length("k", MOST) == MOST
    tuner.most_needs = 100 * 4.5**UNION
    assert tuner.length("k", MOST) == 3
    tuner.most_needs = 100 * 1.5**UNION
    assert tuner.length("k", MOST) == 0


def test_without_a_clock_the_same_answer_has_the_same_passes() -> None:
    """However long they take."""
    lengths = []
    for single, noise in ((0.02, 0.0), (1.0, 0.9)):
        machine, tuner, found = Machine(single=single, noise=noise), Tuner(share=0.5), []
        tuner.most_needs = 400
        chance = random.Random(2)
        for i in range(400):
            n = tuner.length("k", MOST, "ngram")
            found.append(n)
            tuner.costs.observe(machine.step(n + 1))
            tuner.drew(machine.step(1).seconds)
            tuner.drafted("ngram", n, machine.step(1).seconds)
            right = 0.9 if i < 200 else 0.1
            taken = next((i for i in range(MOST) if chance.random() >= right), MOST)
            for place in range(min(taken + 1, MOST)):
                tuner.saw("k", place, place < taken)
            if n:
                tuner.tried("k")
                tuner.ran("ngram", n, min(n, taken), machine.step(n + 1).seconds)
            else:
                tuner.ran_single(machine.step(1).seconds)
        lengths.append(found)
    assert lengths[0] == lengths[1]
    assert max(lengths[0][:200]) > 1
    assert sum(lengths[0][250:]) < sum(lengths[0][50:200]) / 4


@pytest.mark.parametrize(
    ("share", "right", "pays"), [(1.0, 0.8, True), (0.12, 0.8, False), (0.25, 0.6, False)]
)
def test_stated_costs_say_what_a_trace_did(share: float, right: float, pays: bool) -> None:
    """Drafts that cost nothing pay where all is in memory, and not from a disk (docs/speculation.md)."""
    tuner = Tuner(share=share)
    for _ in range(100):
        for place in range(MOST):
            if tuner.acceptance.at("k", place) < right:
                tuner.saw("k", place, True)
            else:
                tuner.saw("k", place, False)
    assert (tuner.best("k", MOST, "ngram")[1] > 1.03) is pays


def test_what_is_run_again_counts() -> None:
    """Behind a wrong guess a memory that cannot be rolled back runs what was right once more."""
    one, again = Tuner(), Tuner()
    again.runs_again = True
    for tuner in (one, again):
        machine = Machine(slope=0.5, noise=0.0)
        for n in (*range(1, 10), *range(1, 10)):
            tuner.costs.observe(machine.step(n))
        for _ in range(50):
            tuner.saw("k", 0, True)
            tuner.saw("k", 1, False)
    assert again.utility("k", 1) > 0.95 * one.utility("k", 1)
    assert again.utility("k", 2) < 0.8 * one.utility("k", 2)


def test_a_batch_does_not_try_for_ever() -> None:
    tuner, machine = Tuner(), Machine(slope=0.9, noise=0.0)
    for n in (8, 16, 24) * 6:
        tuner.together.observe(machine.step(n))
    lengths = []
    for _ in range(100):
        n = tuner.length("k", MOST, n_answers=8)
        lengths.append(n)
        if n:
            tuner.tried("k")
            tuner.saw("k", 0, False)
    assert sum(n > 0 for n in lengths) <= 3 * TRIAL


def test_answers_and_drafts_are_weighed_together() -> None:
    """Where more tokens of a pass are nearly free, as many answers as there are, with drafts; where they cost
    what a single one does, neither; and drafts that want too many experts are none."""
    cheap, dear = Tuner(), Tuner()
    for tuner, slope in ((cheap, 0.05), (dear, 0.98)):
        machine = Machine(slope=slope, noise=0.0)
        for n in (*range(1, 10), 16, 24, 32, 64) * 4:
            tuner.together.observe(machine.step(n))
            tuner.costs.observe(machine.step(n))
        for place in range(MOST):
            for _ in range(60):
                tuner.saw("k", place, True)
        assert tuner.length("k", MOST, n_answers=4) >= 0
    two, eight = cheap.foreseen(2), cheap.foreseen(8)
    assert two is not None
    assert eight is not None
    assert eight > 1.4 * two
    cheap.most_needs = 10
    without = cheap.foreseen(8)
    assert without is not None
    assert without < eight / 2
    one, more = dear.foreseen(2), dear.foreseen(8)
    assert one is not None
    assert more is not None
    assert more < 1.05 * one
    assert Tuner().foreseen(2) is None
    assert Tuner(share=1.0).foreseen(2) is None


def test_what_is_seen_to_be_wrong_is_never_run() -> None:
    """Of drafts that cost nothing to compare: the first answer of a model, and a short one."""
    tuner, machine = Tuner(), Machine(right=0.0, slope=0.6)
    assert play(tuner, machine, 32, is_free=True) <= machine.plain / 0.97
    for right, slope in ((0.3, 0.6), (0.8, 0.9)):
        tuner, machine = Tuner(), Machine(right=right, slope=slope)
        assert play(tuner, machine, 100, is_free=True) <= machine.plain / 0.95


def test_with_room_for_the_experts_of_one_answer_only_that_is_looked_up_for() -> None:
    """As others begin and end; and what is fixed stays, for measurements."""
    tuner, n_answers, offers = Tuner(), 1, []
    tuner.expect_needs(100)
    tuner.most_needs = 100 * 3**UNION
    made = Made(tuner, Machine(right=1.0, slope=0.2))
    source = Guesses(made, "k", is_free=True)
    source.offer = lambda most: offers.append(most) or Offer(most, "k")  # type: ignore[method-assign,func-returns-value]
    drafting = Drafting(
        tuner, [source], made,
        run_single=made.run_single, draw=made.draw, cut=list, clock=lambda: made.now,
        n_answers=lambda: n_answers,
    )  # fmt: skip
    with closing(drafting.tokens([0])) as tokens:

        def looks() -> int:
            before = len(offers)
            for _ in range(12):
                next(tokens)
            return len(offers) - before

        assert looks() > 3
        n_answers = 2
        assert looks() <= 1  # what was drafted is still said
        n_answers = 1
        assert looks() > 3
        tuner.most_needs = 50
        assert looks() <= 1
        tuner.fixed = 1
        assert looks() > 3


def test_drafts_of_a_model_cost_what_its_weights_say() -> None:
    """Ten layers, and the block is one more, with the output matrix; half in memory it waits as they do."""
    layer = ExpertLayer(8, (40, 60))
    info = fake_info(
        n_layer=10, n_expert=8, n_expert_used=2, expert_layers=(layer,) * 10, tensor_bytes=10 * 800 + 490,
        embedding_bytes=20, output_bytes=20,
    )  # fmt: skip
    assert token_bytes(info) == 10 * 245 + 20
    assert block_takes(info, 1.0) == pytest.approx((245 + 20) / 2470)
    assert block_takes(info, 0.5) == pytest.approx((245 * 2 + 20) / 2470)
    tied = fake_info(
        n_layer=10, n_expert=8, n_expert_used=2, expert_layers=(layer,) * 10, tensor_bytes=10 * 800 + 470,
        embedding_bytes=20,
    )  # fmt: skip
    assert block_takes(tied, 1.0) == block_takes(info, 1.0)
    assert model_takes(info, tied) == 1.0


@pytest.mark.parametrize(
    ("takes", "right", "share", "pays"),
    [(0.1, 0.85, 1.0, True), (0.2, 0.95, 1.0, True), (0.3, 0.85, 1.0, False), (0.1, 0.85, 0.25, False)],
)
def test_a_block_drafts_by_stated_costs_where_it_would_pay(
    takes: float, right: float, share: float, pays: bool
) -> None:
    tuner = Tuner(share=share, takes={"mtp": takes})
    for _ in range(100):
        for place in range(MOST):
            tuner.saw("mtp", place, tuner.acceptance.at("mtp", place) < right)
    assert (tuner.best("mtp", MOST, "mtp")[1] > 1.03) is pays
