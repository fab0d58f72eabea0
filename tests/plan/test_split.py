"""The configurator of splits: the cache that it replays, its search, and what a file says of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from fake_backend import fake_info
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_gguf.bench.simulate import POLICIES, accesses, simulate
from mobile_gguf.bench.synthetic import synthesise_trace
from mobile_gguf.engine.split import Split
from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.options.words import RAM
from mobile_gguf.plan.speed import Pass, Reads
from mobile_gguf.plan.split import (
    WORTH,
    Choice,
    Costs,
    Outcome,
    _convex,
    _move_quanta,
    as_measured,
    configure,
    hit_shares,
    search,
    stack_distances,
)
from mobile_gguf.plan.split_cache import Shape, missing_segments
from mobile_gguf.plan.split_file import SplitPlan, read_split_plans, split_plan_for, split_plans_text

N_LAYER, N_EXPERT, K = 4, 16, 3
TRACE = synthesise_trace(N_LAYER, N_EXPERT, K, n_prompt=0, n_decode=80, seed=3)
ROUTES = TRACE.experts
# reads that cost as much as they compute, in a pass without anything else
ONE = Pass(K, N_LAYER, rest_s=0.0, expert_s=3e-3)


def reads(seconds: float) -> Reads:
    """An expert's, one after the other."""
    return Reads(1.0, 0.0, seconds, 1)


def missing(capacity: int, n_segments: int = 1, kept: int | None = None, **more) -> np.ndarray:
    shape = Shape(N_LAYER, N_EXPERT, n_segments)
    kept = n_segments if kept is None else kept
    return missing_segments(ROUTES, shape, capacity, [kept] * N_LAYER, [0.0] * N_LAYER, **more)


@pytest.mark.parametrize("eviction", ["lru", "moepic", "decay"])
@pytest.mark.parametrize("capacity", [8, 20, 40])
def test_whole_experts_miss_what_the_simulator_says(eviction: str, capacity: int) -> None:
    wanted = simulate(accesses(TRACE, K), capacity, POLICIES[eviction](N_LAYER, N_EXPERT))
    # the simulator's lru tells layers of a step apart, the engine's does not
    slack = 0.03 * wanted if eviction == "lru" else 0
    assert abs(missing(capacity, eviction=eviction).sum() - wanted) <= slack


@pytest.mark.parametrize("n_segments", [2, 5])
def test_all_segments_kept_are_whole_experts(n_segments: int) -> None:
    whole = missing(20)
    assert (missing(20 * n_segments, n_segments) == n_segments * whole).all()


def by_hand(capacity: int, n_segments: int, kept: int) -> np.ndarray:
    """The same with a record for every segment, and no heap: the smallest key of all goes first."""
    step = np.log(4) / 12
    there: dict[tuple[int, int, int], float] = {}
    uses: dict[tuple[int, int], int] = {}
    found = np.zeros(ROUTES.shape[:2], np.int64)
    for time, token in enumerate(ROUTES):
        for layer, experts in enumerate(token):
            needs = [(layer, int(e), s) for e in sorted(experts) for s in range(n_segments)]
            pinned = set(needs)
            for e in experts:
                uses[layer, int(e)] = uses.get((layer, int(e)), 0) + 1
            fresh = [need for need in needs if need not in there]
            found[time, layer] = len(fresh)
            while len(there) + len(fresh) > capacity:
                keys_of = {
                    part: key + (step if part[0] > layer else 0.0)
                    for part, key in there.items()
                    if part not in pinned
                }
                del there[min(keys_of, key=lambda part: (keys_of[part], part))]
            for _, e, s in needs:
                own = time * step + np.log(uses[layer, e])
                there[layer, e, s] = own if s < kept else own - 1e9
    return found


@pytest.mark.parametrize(("n_segments", "kept"), [(2, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_leading_segments_stay_and_the_others_go_first(n_segments: int, kept: int, share: float) -> None:
    capacity = int(share * N_LAYER * N_EXPERT * n_segments)
    assert missing(capacity, n_segments, kept).sum() == by_hand(capacity, n_segments, kept).sum()


def test_splitting_moves_more_bytes() -> None:
    """Where memory is scarce: hit rates are concave in it, and of what hits only a part is saved."""
    routes = synthesise_trace(N_LAYER, 64, 4, n_prompt=0, n_decode=60).experts
    shape = Shape(N_LAYER, 64, 4)
    rows = [
        missing_segments(routes, shape, shape.n_parts // 8, [kept] * N_LAYER, [0.0] * N_LAYER).sum()
        for kept in (4, 3, 2, 1)
    ]
    assert rows == sorted(rows)
    assert rows[0] < 0.7 * rows[-1]


def test_a_quota_is_a_wish() -> None:
    shape = Shape(N_LAYER, N_EXPERT, 1)
    shares = [0.7, 0.1, 0.1, 0.1]
    plain, wished = (
        missing_segments(ROUTES, shape, 20, [1] * N_LAYER, wish).sum(0) for wish in ([0.0] * N_LAYER, shares)
    )
    assert wished[0] < plain[0]
    assert wished[1:].sum() > plain[1:].sum()
    # nothing is refused: a layer without room of its own still gets what it needs
    none = missing_segments(ROUTES, shape, 20, [1] * N_LAYER, [1.0, 0.01, 0.01, 0.01])
    assert (none[:, 1:] <= K).all()


def test_a_budget_below_a_token_is_refused() -> None:
    with pytest.raises(UsageError, match="too small for the experts"):
        missing(2)
    with pytest.raises(UsageError, match="smaller than the experts"):
        configure(ROUTES, Shape(N_LAYER, N_EXPERT, 4), 4 * K - 1, 1, Costs(ONE, reads(1e-3)))
    with pytest.raises(UsageError, match="text is too short"):
        configure(ROUTES[:7], Shape(N_LAYER, N_EXPERT, 4), 100, 1, Costs(ONE, reads(1e-3)))


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_distances_are_those_of_a_list(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    routes = np.stack([[rng.permutation(5)[:k] for _ in range(2)] for _ in range(12)]).astype(np.int32)
    routes[rng.random(routes.shape[:2]) < 0.1] = -1
    found = stack_distances(routes, 5)
    for layer in range(2):
        order: list[int] = []  # the one used last first
        for time, ids in enumerate(routes[:, layer].tolist()):
            for rank, e in enumerate(ids):
                wanted = -1 if e < 0 else order.index(e) if e in order else 5
                assert found[time, layer, rank] == wanted
            used = [e for e in ids if e >= 0]
            order = used + [e for e in order if e not in used]


def test_hits_grow_with_what_is_there() -> None:
    shares = hit_shares(stack_distances(ROUTES, N_EXPERT), N_EXPERT)
    assert shares.shape == (N_LAYER, N_EXPERT + 1, K + 1)
    assert shares.sum(-1) == pytest.approx(np.ones(shares.shape[:2]))
    hits = shares @ np.arange(K + 1)
    assert (hits[:, 0] == 0).all()
    assert (np.diff(hits, axis=1) >= -1e-12).all()


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_no_division_of_convex_curves_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_quanta = 6
    curves = np.array([_convex(np.sort(rng.random(n_quanta + 1))[::-1]) for _ in range(3)])
    given = _move_quanta(curves, n_quanta)
    assert given.sum() == n_quanta
    best = min(
        sum(curve[n] for curve, n in zip(curves, counts, strict=True))
        for counts in itertools.product(range(n_quanta + 1), repeat=3)
        if sum(counts) == n_quanta
    )
    assert curves[np.arange(3), given].sum() == pytest.approx(best)


def test_a_convex_curve_lies_below() -> None:
    values = np.array([5.0, 5.0, 3.0, 3.0, 0.0, 0.0])
    assert _convex(values).tolist() == [5.0, 3.75, 2.5, 1.25, 0.0, 0.0]


def test_memory_goes_where_it_saves_most() -> None:
    """A layer with ever other experts gains nothing, one with few gains all that they need."""
    n_tokens = 64
    few = np.tile(np.arange(K), (n_tokens, 1))
    every = np.arange(n_tokens * K).reshape(n_tokens, K) % N_EXPERT
    routes = np.stack([few, every], axis=1).astype(np.int32)
    shares = hit_shares(stack_distances(routes, N_EXPERT), N_EXPERT)
    kept, wishes = search(shares, Shape(2, N_EXPERT, 4), 4 * 2 * K, Costs(Pass(K, 2, 0.0, 1e-6), reads(1e-3)))
    room = 4 * 2 * K - 3 * K
    assert wishes[0] * room == pytest.approx(4 * K, abs=1)
    assert kept[0] == 4
    assert sum(wishes) == pytest.approx(1)


def test_a_disk_that_is_all_that_counts_keeps_experts_whole() -> None:
    shape = Shape(N_LAYER, N_EXPERT, 4)
    choice = configure(ROUTES, shape, 4 * 20, 1000, Costs(replace(ONE, expert_s=1e-6), reads(10e-3)))
    assert choice.chosen is choice.whole
    assert all(one.n_bytes > choice.whole.n_bytes for one in choice.alike)
    assert all(one.seconds > choice.whole.seconds for one in choice.alike)


def test_what_is_hidden_is_worth_a_split() -> None:
    """A prediction that is always right, and time for as many bytes as a layer misses on average.

    Half of every expert always fits into it, and three whole ones do not.
    """
    n_tokens = 96
    rng = np.random.default_rng(4)
    # each token wants other experts, so that whole ones are nearly always missed as a whole
    routes = np.stack([[rng.permutation(N_EXPERT)[:K] for _ in range(N_LAYER)] for _ in range(n_tokens)])
    costs = Costs(replace(ONE, expert_s=1e-3), reads(1e-3), precision=1.0, window_s=1.6e-3)
    shape = Shape(N_LAYER, N_EXPERT, 4)
    choice = configure(routes.astype(np.int32), shape, 4 * 32 + 12, 1000, costs)
    assert choice.chosen is not choice.whole
    assert choice.chosen.seconds < 0.97 * choice.whole.seconds


def test_predicted_reads_are_hidden_as_far_as_the_window_goes() -> None:
    one = replace(ONE, expert_s=0.0)
    plain, ahead = Costs(one, reads(1e-3)), Costs(one, reads(1e-3), precision=0.5, window_s=1e-3)
    assert plain.layer_seconds(2.0) - ahead.layer_seconds(2.0) == pytest.approx(1e-3)
    assert plain.layer_seconds(3.0) - ahead.layer_seconds(3.0) == pytest.approx(1e-3)  # not 1.5
    assert ahead.layer_seconds(0.0) == 0.0


def choice_of(seconds: tuple[float, ...], chosen: int) -> Choice:
    """Whole experts, two splits alike, and one by layer, which take so long; the number of the chosen one."""
    found = [Outcome((4 - i,), (0.0,), one, 100.0 + i) for i, one in enumerate(seconds)]
    return Choice(found[0], (found[1], found[2]), found[3], found[chosen])


def seconds_of(choice: Choice) -> list[float]:
    return [one.seconds for one in (choice.whole, *choice.alike, choice.by_layer)]


def test_what_whole_experts_took_sets_the_others_right() -> None:
    """Work besides is there under any split; a disk that is quicker now is so for all of them."""
    more = as_measured(choice_of((0.04, 0.06, 0.11, 0.04), 0), 0.06)
    assert seconds_of(more) == pytest.approx([0.06, 0.08, 0.13, 0.06])
    less = as_measured(choice_of((0.04, 0.06, 0.11, 0.04), 0), 0.03)
    assert seconds_of(less) == pytest.approx([0.03, 0.045, 0.0825, 0.03])
    assert more.chosen is more.whole
    assert less.chosen is less.whole
    assert [one.n_bytes for one in more.alike] == [101.0, 102.0]


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_a_split_that_was_measured_to_gain_nothing_is_not_chosen(chosen: int) -> None:
    made = choice_of((0.04, 0.03, 0.03, 0.03), chosen)
    kept = as_measured(made, 0.06, 0.05)
    assert (kept.chosen.seconds, kept.chosen.n_bytes) == (0.05, 100.0 + chosen)
    assert seconds_of(kept)[chosen] == 0.05
    undone = as_measured(made, 0.06, (1 - WORTH) * 0.06)
    assert undone.chosen is undone.whole
    assert undone.chosen.seconds == 0.06
    assert seconds_of(undone)[chosen] == pytest.approx(0.06, rel=2 * WORTH)


# in a file

PLAN = SplitPlan(
    RAM, 1000, 4, (4, 2, 2, 4), (0.0, 0.5, 0.25, 0.25), 10.0, 5.0, 12.0, 4.0, "a text", 100
)  # fmt: skip


def info_with(text: str | None, segments: int = 4):
    metadata = {} if text is None else {keys.PLAN: text}
    return fake_info(metadata=metadata, segments=segments)


def test_a_plan_is_found_again_for_a_budget_near_its_own() -> None:
    other = replace(PLAN, budget_bytes=2000, kept=(4,) * 4, shares=(0.0,) * 4)
    info = info_with(split_plans_text([], [PLAN, other]))
    assert read_split_plans(info) == [PLAN, other]
    assert split_plan_for(info, RAM, 1040) == PLAN
    assert split_plan_for(info, RAM, 1960) == other
    assert split_plan_for(info, RAM, 1500) is None
    assert split_plan_for(info, "VRAM", 1000) is None
    assert split_plan_for(info_with(None), RAM, 1000) is None
    assert PLAN.split == Split(PLAN.kept, PLAN.shares)
    assert other.split is None
    assert other.is_whole


def test_a_new_plan_takes_the_place_of_the_one_for_its_budget() -> None:
    other = replace(PLAN, budget_bytes=2000)
    again = replace(PLAN, ms=1.0)
    info = info_with(split_plans_text([PLAN, other], [again]))
    assert read_split_plans(info) == [other, again]


def test_a_plan_for_other_segments_is_no_plan() -> None:
    assert read_split_plans(info_with(split_plans_text([], [PLAN]), segments=2)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"kept": [4, 2, 2]}, {"kept": [4, 2, 2, 5]}, {"kept": [4, 2, 2, 0]}, {"kept": [4, 2, 2, 1.5]},
        {"kept": 3}, {"shares": [0, 0, 0, 2]}, {"shares": [0, 0, 0, float("nan")]}, {"shares": [0, 0, 0, -1]},
        {"budget_bytes": 0}, {"budget_bytes": "1"}, {"n_segments": True}, {"ms": float("inf")}, {"ms": "1"},
        {"tier": 3}, {"text": None}, {"more": 1}, {"bytes": None},
    ],
)  # fmt: skip
def test_damaged_plans_are_refused(change: dict) -> None:
    entry = asdict(PLAN) | change
    with pytest.raises(ModelFormatError, match="calibrate --plan"):
        read_split_plans(info_with(json.dumps({"plans": [entry]})))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plans": 3}', '{"plans": [3]}', '{"plans": {"a": 1}}'])
def test_what_is_no_list_of_plans_is_refused(text: str) -> None:
    with pytest.raises(ModelFormatError, match="damaged"):
        read_split_plans(info_with(text))
