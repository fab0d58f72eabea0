"""What distributions over the next token are apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mobile_gguf.generate.passes.divergence import log_softmax, row_divergence


def test_a_row_against_itself_costs_nothing() -> None:
    row = log_softmax(np.array([1.0, 2.0, -3.0]))
    assert row_divergence(row, row) == 0


def test_by_hand() -> None:
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert row_divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_a_token_that_cannot_come_counts_for_nothing() -> None:
    p = log_softmax(np.array([0.0, 0.0, -np.inf]))
    assert row_divergence(p, p) == 0
    assert row_divergence(p, log_softmax(np.array([0.0, 0.0, 1.0]))) > 0


def test_what_is_no_number_is_no_small_loss() -> None:
    p = log_softmax(np.array([0.0, 1.0]))
    assert row_divergence(p, np.array([np.nan, 0.0])) == math.inf
    assert row_divergence(p, np.array([-np.inf, 0.0])) == math.inf
