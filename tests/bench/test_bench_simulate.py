"""The cache simulator against brute force, and the made-up trace against the real one's figures."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_gguf.bench.misses import count_misses, format_misses
from mobile_gguf.bench.simulate import (
    POLICIES,
    Accesses,
    LeastRecent,
    MoEpic,
    TwoRate,
    accesses,
    simulate,
    simulate_min,
)
from mobile_gguf.bench.synthetic import synthesise_trace
from mobile_gguf.bench.trace import Trace

N_EXPERT = 5
sequences = st.lists(st.integers(0, N_EXPERT - 1), min_size=1, max_size=12)
capacities = st.integers(1, 4)


def one_layer(sequence: list[int]) -> Accesses:
    """One expert a step, all in one layer, everything counted."""
    n = len(sequence)
    needs = [np.array([expert], dtype=np.int64) for expert in sequence]
    return Accesses(needs, list(range(n)), [0] * n, [True] * n, 1, N_EXPERT)


def small_trace(seed: int, n_layer: int = 3, n_expert: int = 8, k: int = 2, n_steps: int = 30) -> Trace:
    rng = np.random.default_rng(seed)
    experts = np.stack(
        [[rng.permutation(n_expert)[:k] for _ in range(n_layer)] for _ in range(n_steps)]
    ).astype(np.int32)
    weights = np.full(experts.shape, 1 / k, dtype=np.float32)
    return Trace("small", experts, weights, n_expert, 4, "small")


def fewest_misses(sequence: list[int], capacity: int) -> int:
    """All ways of keeping any experts after each access, the one just used included or not."""
    states = {frozenset(): 0}
    for expert in sequence:
        following: dict[frozenset[int], int] = {}
        for held, misses in states.items():
            cost = misses + (expert not in held)
            for size in range(capacity + 1):
                for kept in itertools.combinations(sorted(held | {expert}), size):
                    key = frozenset(kept)
                    following[key] = min(cost, following.get(key, cost))
        states = following
    return min(states.values())


@given(sequences, capacities)
@settings(max_examples=150, deadline=None)
def test_min_is_the_fewest_misses_possible(sequence: list[int], capacity: int) -> None:
    assert simulate_min(one_layer(sequence), capacity) == fewest_misses(sequence, capacity)


@given(sequences, capacities)
def test_lru_is_the_textbook_list(sequence: list[int], capacity: int) -> None:
    order: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for expert in sequence:
        misses += expert not in order
        order.pop(expert, None)
        order[expert] = None
        if len(order) > capacity:
            order.popitem(last=False)
    assert simulate(one_layer(sequence), capacity, LeastRecent(1, N_EXPERT)) == misses


@given(st.lists(st.integers(0, N_EXPERT - 1), min_size=1, max_size=40), capacities)
def test_moepic_evicts_the_smallest_priority_of_the_paper(sequence: list[int], capacity: int) -> None:
    rho, omega = 0.25, 8.0
    used: dict[int, list[int]] = {}
    held: set[int] = set()
    misses = 0
    for step, expert in enumerate(sequence):
        if expert not in held:
            misses += 1
            if len(held) == capacity:
                # exact ties are broken by the id, as the simulator does
                priority = {e: len(used[e]) * rho ** ((step - used[e][-1]) / omega) for e in held}
                least = min(priority.values())
                held.remove(min(e for e in held if math.isclose(priority[e], least, rel_tol=1e-9)))
            held.add(expert)
        used.setdefault(expert, []).append(step)
    policy = MoEpic(1, N_EXPERT, rho, omega)
    assert simulate(one_layer(sequence), capacity, _Rounded(policy)) == misses


class _Rounded(LeastRecent):
    """Scores without the last bits, so that ties in exact arithmetic are ties."""

    def __init__(self, policy: MoEpic) -> None:
        super().__init__(policy.n_layer, policy.n_expert)
        self.policy = policy

    def touch(self, ids: np.ndarray, step: int, layer: int) -> None:
        self.policy.touch(ids, step, layer)

    def score(self, ids: np.ndarray, step: int, layer: int) -> np.ndarray:
        return np.round(self.policy.score(ids, step, layer), 9)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_two_rate_score_is_the_sum_over_all_uses(uses: list[bool]) -> None:
    policy = TwoRate(1, 1, short=1, long=16, short_weight=3)
    only = np.array([0])
    policy.touch(only, 0, 0)
    times = [0]
    for step, used in enumerate(uses, start=1):
        if used:
            policy.touch(only, step, 0)
            times.append(step)
    now = len(uses) + 3
    expected = sum(3 * 0.5 ** (now - time) + 0.5 ** ((now - time) / 16) for time in times)
    assert policy.score(only, now, 0)[0] == pytest.approx(expected)


def test_layers_still_to_come_have_missed_one_visit_less() -> None:
    policy = TwoRate(3, 2)
    policy.touch(np.array([0, 2, 4]), 5, 0)
    assert policy.missed_visits(np.array([0, 2, 4]), 6, 1).tolist() == [1, 1, 0]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_policy_beats_the_bound_and_a_full_cache_misses_once(name: str, seed: int) -> None:
    trace = small_trace(seed)
    everything = accesses(trace, trace.k)
    counted = Accesses(**{**everything.__dict__, "counted": [True] * len(everything.needs)})
    for capacity in (2, 5, 11):
        policy = POLICIES[name](trace.n_layer, trace.n_expert)
        assert simulate(counted, capacity, policy) >= simulate_min(counted, capacity)
    all_ids = {int(expert) for need in everything.needs for expert in need}
    policy = POLICIES[name](trace.n_layer, trace.n_expert)
    assert simulate(counted, trace.n_layer * trace.n_expert, policy) == len(all_ids)


def test_what_a_layer_needs_together_must_fit() -> None:
    with pytest.raises(ValueError, match="cannot hold the 2 of one layer"):
        simulate(accesses(small_trace(0), 2), 1, LeastRecent(3, 8))


def test_only_decoding_counts_and_unrouted_layers_ask_for_nothing() -> None:
    trace = small_trace(3)
    experts = trace.experts.copy()
    experts[:3, 2] = -1  # the prompt's last layer, for all but its last token
    cut = accesses(Trace("t", experts, trace.weights, 8, 4, "t"), 1, prompt_k=2, n_decode=5)
    assert len(cut.needs) == 9 * 3 - 3
    assert cut.n_counted == 5 * 3
    assert [len(need) for need in cut.needs] == [2] * (4 * 3 - 3) + [1] * 15


def test_made_up_trace_has_the_locality_of_the_real_one() -> None:
    """The figures of DESIGN.md section 2 for Qwen3-30B-A3B: LRU and MIN, for K and K/2."""
    published = {
        (0.125, 6): (2.51, 1.20), (0.125, 3): (1.05, 0.47),
        (0.25, 6): (1.04, 0.42), (0.25, 3): (0.36, 0.18),
    }  # fmt: skip
    trace = synthesise_trace(n_layer=16)
    for (share, k), (lru, minimum) in published.items():
        asked = accesses(trace, k)
        capacity = int(share * trace.n_layer * trace.n_expert)
        policy = LeastRecent(trace.n_layer, trace.n_expert)
        assert simulate(asked, capacity, policy) / asked.n_counted == pytest.approx(lru, rel=0.2)
        assert simulate_min(asked, capacity) / asked.n_counted == pytest.approx(minimum, rel=0.2)


def test_made_up_trace_is_valid_and_repeatable() -> None:
    trace = synthesise_trace(n_layer=4, n_expert=16, k=3, n_prompt=2, n_decode=10)
    again = synthesise_trace(n_layer=4, n_expert=16, k=3, n_prompt=2, n_decode=10)
    assert trace.digest() == again.digest()
    assert trace.experts.shape == (12, 4, 3)
    assert all(len(set(ids)) == 3 for ids in trace.experts.reshape(-1, 3).tolist())
    assert np.allclose(trace.weights.sum(axis=2), 1)
    assert (np.diff(trace.weights, axis=2) <= 0).all()
    assert (
        synthesise_trace(n_layer=4, n_expert=16, k=3, n_prompt=2, n_decode=10, seed=2).digest()
        != trace.digest()
    )


def test_miss_table() -> None:
    rows = count_misses(small_trace(0), [0.5, 1.0])
    assert [(row["share"], row["k"]) for row in rows] == [(0.5, 2), (0.5, 1), (1.0, 2), (1.0, 1)]
    lines = format_misses(small_trace(0), rows).splitlines()
    assert (
        lines[0]
        == "misses per token and layer; small: 3 layers x 8 experts, 26 decoded tokens after 4 of prompt"
    )
    assert lines[2] == "| budget | k | lru | moepic | decay | two-rate | MIN |"
    assert lines[4].startswith("| 50% | 2 | ")
