"""The big-little decision and the order of passes."""

import math

import numpy as np
import pytest
from fake_backend import FakeBackend, scripted
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mobile_gguf.generate.passes.decode import (
    ALL_EXPERTS,
    Pass,
    Policy,
    decode_prompt,
    decode_token,
    default_little_k,
    is_important,
    max_probability,
)


def started(sure=()):
    backend = FakeBackend(scripted("abcdef", sure))
    backend._n_prompt = 1
    decode_prompt(backend, [1])
    backend.log.clear()
    return backend


@pytest.mark.parametrize(("top_k", "little"), [(8, 4), (6, 3), (5, 2), (2, 1), (1, 1), (0, 0)])
def test_little_is_half_the_top_k_and_at_least_one(top_k, little):
    assert default_little_k(top_k) == little


def test_max_probability_of_known_logits():
    assert max_probability(np.zeros(4)) == pytest.approx(0.25)
    assert max_probability(np.log([0.7, 0.2, 0.1])) == pytest.approx(0.7)


def test_max_probability_is_stable_for_large_logits():
    assert max_probability(np.array([1e4, 1e4 - 1], np.float32)) == pytest.approx(1 / (1 + math.exp(-1)))
    assert max_probability(np.array([0.0, -np.inf])) == 1.0


@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(-80, 80, width=32)))
def test_max_probability_is_the_largest_of_a_softmax(logits):
    exact = np.exp(logits.astype(np.float64))
    assert max_probability(logits) == pytest.approx((exact / exact.sum()).max(), rel=1e-5)


@given(st.floats(0, 1))
def test_gamma_0_is_never_and_above_1_always_important(probability):
    assert not is_important(probability, 0)
    assert is_important(probability, 1.01)


def test_the_threshold_itself_is_not_important():
    assert not is_important(0.7, 0.7)
    assert is_important(0.69999, 0.7)


def test_logits_that_are_not_numbers_are_important_unless_nothing_is():
    assert is_important(math.nan, 0.7)
    assert not is_important(math.nan, 0)


def test_exact_is_one_big_pass():
    backend = started()
    assert decode_token(backend, 2, Policy("exact")) is Pass.BIG
    assert backend.log == ["big 1"]


def test_little_is_one_little_pass():
    backend = started()
    assert decode_token(backend, 2, Policy("little", 0.7, 4)) is Pass.LITTLE
    assert backend.rows[-1] == (2, 4)


def test_a_sure_token_keeps_its_little_row():
    backend = started(sure=[0.9])
    assert decode_token(backend, 2, Policy("big-little", 0.7, 4)) is Pass.LITTLE
    assert backend.log == ["little 1"]


def test_an_important_token_is_hinted_rolled_back_and_run_big():
    backend = started(sure=[0.5])
    assert decode_token(backend, 2, Policy("big-little", 0.7, 4)) is Pass.FALLBACK
    assert backend.log == ["little 1", "prefetch", "back", "big 1"]
    assert backend.rows == [(1, ALL_EXPERTS), (2, ALL_EXPERTS)]


def test_a_prompt_is_big_even_after_little_tokens():
    backend = started()
    decode_token(backend, 2, Policy("little", 0.7, 4))
    assert decode_prompt(backend, [3, 4]) is Pass.BIG
    assert backend.rows[-2:] == [(3, ALL_EXPERTS), (4, ALL_EXPERTS)]


@pytest.mark.parametrize(
    ("policy", "always"),
    [
        (Policy("exact"), True),
        (Policy("little"), False),
        (Policy("big-little", 1.0), False),
        (Policy("big-little", 1.01), True),
    ],
)
def test_which_policies_never_keep_a_little_row(policy, always):
    assert policy.always_big is always


# the importance head


def by_head(*important, threshold=0.4, little_k=3):
    backend = FakeBackend(scripted("abcdef", [0.1] * 6), important=important)
    backend._n_prompt = 1
    decode_prompt(backend, [1])
    backend.log.clear()
    policy = Policy("big-little", little_k=little_k, importance="head", head_threshold=threshold)
    return backend, policy


@pytest.mark.parametrize(
    ("probability", "expected"),
    [(0.41, Pass.BIG), (0.4, Pass.LITTLE), (0.1, Pass.LITTLE), (None, Pass.BIG), (math.nan, Pass.BIG)],
)
def test_the_head_chooses_one_pass(probability, expected):
    backend, policy = by_head(probability)
    assert decode_token(backend, ord("a"), policy) is expected
    assert backend.log == ["head", "big 1" if expected is Pass.BIG else "little 1"]
    assert backend.rows[-1] == (ord("a"), ALL_EXPERTS if expected is Pass.BIG else 3)


def test_an_unsure_little_pass_is_kept_where_the_head_decides():
    backend, policy = by_head(0.0)
    assert max_probability(backend.last_logits()) > 0.9
    assert decode_token(backend, ord("a"), policy) is Pass.LITTLE
    assert max_probability(backend.last_logits()) < policy.gamma
    assert "back" not in backend.log


@pytest.mark.parametrize(("threshold", "big"), [(0, True), (1, False)])
def test_thresholds_of_always_and_never(threshold, big):
    for probability in (0.0, 0.5, 1.0):
        backend, policy = by_head(probability, threshold=threshold)
        assert policy.always_big is big
        assert (decode_token(backend, ord("a"), policy) is Pass.BIG) is big


def test_the_head_has_no_say_in_other_modes():
    assert not Policy("little", importance="head").uses_head
    assert not Policy("exact", importance="head").uses_head
    backend, _ = by_head(0.9)
    assert decode_token(backend, ord("a"), Policy("little", little_k=3, importance="head")) is Pass.LITTLE
    assert backend.log == ["little 1"]
