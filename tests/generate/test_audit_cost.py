"""What audits cost: counts whose share bounds the share of the time, whatever the machine."""

from __future__ import annotations

import numpy as np
import pytest

from mobile_gguf.engine.structs import Counters, DeviceCounters, LossCounters
from mobile_gguf.generate.loss.audit_cost import AUDIT_SHARE, AuditCost, Work, work_between
from mobile_gguf.generate.passes.costs import Traffic

TOP_K = 8


def test_the_work_of_a_pass_is_what_it_computed_read_and_uploaded():
    before = Traffic(Counters(n_misses=10), DeviceCounters(n_fetched=5, n_admitted=3))
    after = Traffic(
        Counters(n_misses=13, bytes_read=1 << 20),
        DeviceCounters(n_fetched=6, n_admitted=9),
        loss=LossCounters(n_layers=4, n_missing=16, n_dropped=5, n_left_out=2, n_partial=1, n_substituted=4),
    )
    assert work_between(before, after, TOP_K) == Work(1 - 8 / 32, 3, 1)
    assert work_between(before, before, TOP_K) == Work(1.0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reads", [0.2, 3.0, 40.0])
def test_a_share_of_the_work_is_at_most_that_share_of_the_time(seed, reads):
    """Of tokens that are cheaper than their audits in every way; an audit is run as often as it may be."""
    rng = np.random.default_rng(seed)
    cost, of_tokens, of_audits, since = AuditCost(), [], [], 0
    for _ in range(3000):
        token = Work(rng.uniform(0.3, 1.0), float(rng.poisson(reads)), float(rng.poisson(reads / 2)))
        cost.add_token(token)
        of_tokens.append(token)
        since += 1
        if since >= cost.every and cost.has_room:
            audit = Work(1.0, token.read + float(rng.poisson(2 * reads)), token.uploaded)
            cost.add_audit(audit)
            of_audits.append(audit)
            since = 0
    assert cost.n_audits == len(of_audits) > 10
    assert 0.4 * AUDIT_SHARE < cost.share <= 1.1 * AUDIT_SHARE
    for speeds in rng.exponential(size=(20, 3)) ** 4:  # seconds of each kind of work
        audits, tokens = (
            sum(float(np.dot(speeds, (work.passes, work.read, work.uploaded))) for work in works)
            for works in (of_audits, of_tokens)
        )
        assert audits / (audits + tokens) <= cost.share + 1e-12


def test_before_the_first_tokens_there_is_no_room():
    cost = AuditCost()
    assert not cost.has_room
    assert cost.share == 0
    for _ in range(20):
        cost.add_token(Work(1.0, 2.0))
    assert not cost.has_room
    for _ in range(20):
        cost.add_token(Work(1.0, 2.0))
    assert cost.has_room


def test_audits_that_alone_read_are_the_rarer_the_less_tokens_read():
    """However little a read takes somewhere, on another machine it is all that counts."""
    costs = {}
    for read in (0.0, 0.5, 2.0):
        cost = costs[read] = AuditCost()
        for _ in range(100):
            cost.add_token(Work(0.5, read))
        cost.add_audit(Work(1.0, 4.0))
    assert costs[2.0].every == pytest.approx(2 / 0.045)
    assert costs[0.5].every == pytest.approx(8 / 0.045)
    assert costs[0.0].every == float("inf")
    assert [cost.has_room for cost in costs.values()] == [False, False, True]
