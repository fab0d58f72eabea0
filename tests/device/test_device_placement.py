"""Never slower: contests over scripted step times keep the faster placement, in a bounded number of steps."""

import json
import random

import pytest
from contest_bound import most_steps
from fake_backend import fake_info
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_gguf.device.contest import Contest, Figures, Rules
from mobile_gguf.device.controller import PlacementController
from mobile_gguf.device.placement import placement_file, placement_key, remember, remembered
from mobile_gguf.engine.structs import DeviceInfo
from mobile_gguf.errors import EngineError
from mobile_gguf.options.words import CACHE, HOST, LAYERS

RULES = Rules()
MOST_STEPS = most_steps(RULES)


def hold(contest, times, steps=10_000):
    """Run a contest on ``times(arm, steps since the switch)``; returns the arms that ran until it ended."""
    ran, since = [], 0
    while not contest.decided and len(ran) < steps:
        since = since + 1 if ran and ran[-1] == contest.arm else 0
        ran.append(contest.arm)
        contest.record(times(contest.arm, since), contest.arm)
    return ran


def constant(cache, layers, host=20.0):
    times = {CACHE: cache, LAYERS: layers, HOST: host}
    return lambda arm, _since: times[arm]


@pytest.mark.parametrize(("cache", "layers", "winner"), [(1.0, 2.0, CACHE), (2.0, 1.0, LAYERS)])
@pytest.mark.parametrize("first", [CACHE, LAYERS])
def test_the_faster_one_is_kept(cache, layers, winner, first):
    contest = Contest(first=first)
    ran = hold(contest, constant(cache, layers))
    assert (contest.arm, contest.figures) == (winner, Figures(cache, layers, 20.0))
    assert set(ran) == {CACHE, LAYERS, HOST}


@pytest.mark.parametrize("first", [CACHE, LAYERS])
def test_a_device_slower_than_the_host_is_not_used(first):
    contest = Contest(first=first)
    hold(contest, constant(1.4, 1.3, 1.0))
    assert (contest.arm, contest.figures) == (HOST, Figures(1.4, 1.3, 1.0))
    # and it is asked again when the host has become slower than the device was
    for _ in range(RULES.rest):
        contest.record(2.0, HOST)
    assert not contest.decided
    hold(contest, constant(1.4, 1.3, 2.0))
    assert contest.arm == LAYERS


def test_a_fast_device_pays_almost_nothing_for_the_host():
    contest = Contest()
    ran = hold(contest, constant(1.0, 1.1, 3.0))
    assert contest.arm == CACHE
    assert ran.count(HOST) == RULES.warmup_others + RULES.hopeless_after


def test_of_three_the_beaten_one_is_dropped_and_the_others_go_on():
    random_ = random.Random(2)

    def times(arm, _since):
        return {CACHE: 1.0, LAYERS: 1.02, HOST: 1.4}[arm] * random_.gauss(1, 0.05)

    contest = Contest()
    ran = hold(contest, times)
    assert contest.arm == CACHE
    assert ran.count(HOST) == RULES.warmup_others + RULES.block
    assert ran.count(LAYERS) > RULES.warmup_others + RULES.block


def test_a_cold_cache_is_not_held_against_it():
    contest = Contest()
    hold(contest, lambda arm, since: 1.0 if arm != CACHE else 5.0 if since < RULES.warmup_cache else 0.9)
    assert contest.arm == CACHE


def test_a_tie_leaves_the_incumbent():
    for first in (CACHE, LAYERS):
        contest = Contest(first=first)
        hold(contest, constant(1.0, 1.0))
        assert contest.arm == first


def test_a_hopeless_arm_is_given_up_within_its_block():
    contest = Contest()
    ran = hold(contest, constant(1.0, 10.0))
    assert ran.count(LAYERS) == RULES.warmup_others + RULES.hopeless_after


def test_single_outliers_do_not_decide():
    random_ = random.Random(1)

    def times(arm, _since):
        spike = 50.0 if arm == CACHE and random_.random() < 0.1 else 0.0
        return (1.0 if arm == CACHE else 1.3) + random_.gauss(0, 0.02) + spike

    contest = Contest()
    hold(contest, times)
    assert contest.arm == CACHE


@settings(max_examples=150, deadline=None)
@given(
    ratio=st.floats(1.15, 8.0),
    noise=st.floats(0.0, 0.1),
    faster=st.sampled_from([CACHE, LAYERS, HOST]),
    first=st.sampled_from([CACHE, LAYERS]),
    seed=st.integers(0, 1 << 30),
)
def test_beyond_noise_the_faster_placement_is_kept(ratio, noise, faster, first, seed):
    random_ = random.Random(seed)

    def times(arm, since):
        cold = 3.0 if arm == CACHE and since < RULES.warmup_cache else 1.0
        return 0.01 * (1.0 if arm == faster else ratio) * cold * max(0.1, random_.gauss(1, noise))

    contest = Contest(first=first)
    ran = hold(contest, times)
    assert contest.decided
    assert contest.arm == faster
    assert len(ran) <= MOST_STEPS


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=400, max_size=400), st.sampled_from([CACHE, LAYERS]))
def test_whatever_the_times_a_contest_ends_and_keeps_the_smaller_median(times, first):
    source = iter(times)
    contest = Contest(first=first)
    assert len(hold(contest, lambda _arm, _since: next(source))) <= MOST_STEPS
    winner, loser = contest.figures.of(contest.arm), contest.figures.next_best(contest.arm)
    assert winner is not None
    assert loser is not None
    allowed = 1 + RULES.margin if contest.arm == first else 1
    assert winner <= loser * allowed * (1 + 1e-9)


def test_a_winner_that_became_slower_is_measured_again():
    contest = Contest()
    hold(contest, constant(1.0, 1.5))
    for _ in range(RULES.rest - 1):
        contest.record(2.0, CACHE)
        assert contest.decided
    contest.record(2.0, CACHE)
    assert not contest.decided
    hold(contest, constant(2.0, 1.5))
    assert contest.arm == LAYERS
    # and then rests twice as long
    for _ in range(2 * RULES.rest - 1):
        contest.record(9.0, LAYERS)
        assert contest.decided
    contest.record(9.0, LAYERS)
    assert not contest.decided


def test_a_winner_that_stays_is_left_alone():
    contest = Contest()
    hold(contest, constant(1.0, 1.5))
    for _ in range(5 * RULES.rest):
        contest.record(1.55, CACHE)
    assert contest.decided


# the controller


class Switch:
    def __init__(self):
        self.calls = []

    def __call__(self, placement):
        self.calls.append(placement)


def drive(controller, times, n, mode="exact"):
    for _ in range(n):
        controller.before_step(mode)
        controller.after_step(times[controller.current])


def test_the_winner_is_in_force_remembered_and_told(caplog):
    switch = Switch()
    controller = PlacementController(switch, lambda mode: f"k-{mode}")
    with caplog.at_level("INFO", "mobile_gguf.device"):
        drive(controller, {CACHE: 0.02, LAYERS: 0.01, HOST: 0.04}, MOST_STEPS)
    assert switch.calls[-1] == controller.current == LAYERS
    assert controller.facts() == {
        "chosen": LAYERS, "cache_tps": 50.0, "layers_tps": 100.0, "host_tps": 25.0,
        "decided": True, "reason": "measured",
    }  # fmt: skip
    assert caplog.messages == [
        "placement for mode exact: layers (cache 50.0, layers 100.0, host 25.0 tokens/s)"
    ]
    again = PlacementController(Switch(), lambda mode: f"k-{mode}")
    again.before_step("exact")
    assert again.current == LAYERS
    assert again.facts()["reason"] == "measured in an earlier run"
    assert again.facts()["decided"]
    again.before_step("little")
    assert not again.facts()["decided"]


def test_every_mode_has_a_winner_of_its_own():
    controller = PlacementController(Switch(), lambda _mode: "")
    drive(controller, {CACHE: 1, LAYERS: 2, HOST: 3}, MOST_STEPS, "little")
    drive(controller, {CACHE: 2, LAYERS: 1, HOST: 3}, MOST_STEPS, "exact")
    assert controller.current == LAYERS
    controller.before_step("little")
    assert controller.current == CACHE


def test_a_fixed_placement_is_not_measured():
    switch = Switch()
    controller = PlacementController(switch, lambda _mode: "", fixed=LAYERS, why="all experts fit")
    drive(controller, {CACHE: 1, LAYERS: 100}, 500)
    assert switch.calls == [LAYERS]
    assert controller.facts()["reason"] == "all experts fit"


def test_a_placement_that_fails_leaves_the_other_in_force(caplog):
    def refuse(placement):
        raise EngineError(f"no {placement}")

    controller = PlacementController(refuse, lambda _mode: "")
    drive(controller, {CACHE: 1}, MOST_STEPS)
    assert controller.facts()["chosen"] == CACHE
    assert caplog.messages == ["placement layers is not possible, cache stays: no layers"]


# turns


class Machine:
    """A scripted clock: layers are a little faster, and a trial of uploads ahead slows the steps it is on."""

    def __init__(self):
        self.placement, self.is_held, self.step, self.holds = CACHE, False, 0, []
        self.trials, self.contest_steps = [], []

    def switch(self, placement):
        self.placement = placement

    def hold(self, on):
        self.is_held = on
        self.holds.append(on)

    def seconds(self, controller):
        self.step += 1
        is_trial = not self.is_held and self.placement == LAYERS  # the bursts fall on one arm: the worst case
        if is_trial:
            self.trials.append(self.step)
        if not controller.facts()["decided"]:
            self.contest_steps.append(self.step)
        return {CACHE: 1.0, LAYERS: 0.9, HOST: 5.0}[self.placement] * (1.3 if is_trial else 1.0)


def decide_on(machine, hold, n=MOST_STEPS):
    controller = PlacementController(machine.switch, lambda _mode: "", hold=hold)
    for _ in range(n):
        controller.before_step("exact")
        controller.after_step(machine.seconds(controller))
    return controller


def test_a_trial_of_uploads_ahead_would_spoil_the_contest():
    assert decide_on(Machine(), None).facts()["chosen"] == CACHE  # the slower one


def test_reading_ahead_waits_until_the_contest_is_over():
    machine = Machine()
    assert decide_on(machine, machine.hold).facts()["chosen"] == LAYERS
    assert machine.holds == [True, False]
    assert machine.trials
    assert not set(machine.trials) & set(machine.contest_steps)


def test_a_contest_held_again_takes_its_turn_again():
    holds = []
    controller = PlacementController(Switch(), lambda _mode: "", hold=holds.append)
    drive(controller, {CACHE: 1.0, LAYERS: 1.5, HOST: 3.0}, MOST_STEPS + RULES.rest)
    assert holds == [True, False]
    drive(controller, {CACHE: 2.0, LAYERS: 1.5, HOST: 3.0}, RULES.watch + 1)
    assert holds == [True, False, True]


def test_what_is_not_measured_holds_nothing():
    holds = []
    drive(PlacementController(Switch(), lambda _mode: "", fixed=LAYERS, hold=holds.append), {LAYERS: 1}, 50)
    assert holds == []

    def refuse(placement):
        raise EngineError(f"no {placement}")

    drive(PlacementController(refuse, lambda _mode: "", hold=holds.append), {CACHE: 1}, 200)
    assert holds == [True, False]


def test_before_the_first_step_nothing_is_claimed():
    facts = PlacementController(Switch(), lambda _mode: "").facts()
    assert (facts["decided"], facts["cache_tps"]) == (False, None)


# what is remembered


def test_a_decision_survives_and_damage_is_no_decision():
    remember("k", LAYERS, Figures(0.5, 0.25))
    assert remembered("k") == (LAYERS, Figures(0.5, 0.25))
    assert remembered("other") is None
    for text in (
        "",
        "[]",
        '{"k": 1}',
        '{"k": {"chosen": "host"}}',
        '{"k": {"chosen": "cache", "cache": -1.0, "layers": 1.0, "host": 1.0}}',
        '{"k": {"chosen": "cache", "cache": 0.5, "layers": 1.0}}',
    ):
        placement_file().write_text(text)
        assert remembered("k") is None
    remember("k", CACHE, Figures(0.5, None))
    assert remembered("k") == (CACHE, Figures(0.5, None))


def test_the_file_does_not_grow_without_end():
    for i in range(300):
        remember(str(i), CACHE, Figures(0.5, 0.25))
    assert len(json.loads(placement_file().read_text())) == 256
    assert remembered("299") is not None


def test_a_key_tells_files_devices_budgets_and_settings_apart(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    info = fake_info(files=(file,))
    device = DeviceInfo("GPU0", "a GPU", 5, 10, 0, 0, 4, 0, 1, 1)
    budget = info.expert_bytes // 2
    key = placement_key(info, [device], budget, ["exact", 4])
    assert key == placement_key(info, [device], budget + budget // 100, ["exact", 4])
    other_device = DeviceInfo("GPU0", "another", 5, 10, 0, 0, 4, 0, 1, 1)
    assert key != placement_key(info, [other_device], budget, ["exact", 4])
    assert key != placement_key(info, [device], budget // 2, ["exact", 4])
    assert key != placement_key(info, [device], budget, ["little", 4])
    file.write_bytes(b"xy")
    assert key != placement_key(info, [device], budget, ["exact", 4])
