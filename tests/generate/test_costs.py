"""Counters divided among those who asked, and how many answers are made at once."""

from __future__ import annotations

import random

from mobile_gguf.engine.structs import Counters, LossCounters, PrefetchCounters
from mobile_gguf.generate.passes.costs import Costs, Meter, Share, Traffic
from mobile_gguf.generate.schedule.growth import FIRST_PAUSE, WINDOW, Growth


def test_shares_are_by_what_was_asked_and_add_up() -> None:
    chance, now = random.Random(3), Traffic()
    meter = Meter(lambda: now, lambda: None)
    meter.restart()
    costs = [Costs() for _ in range(4)]
    for _ in range(50):
        askers = chance.sample(costs, chance.randrange(1, 5))
        meter.begin([Share(one, chance.randrange(9), chance.randrange(3)) for one in askers])
        host = now.host + Counters(
            n_hits=chance.randrange(99),
            bytes_read=chance.randrange(9999),
            resident_bytes=chance.randrange(9),
            resident_bytes_peak=chance.randrange(99),
        )
        n = now.loss.n_dropped + chance.randrange(5)
        loss = LossCounters(n_dropped=n, moved_weight=n / 8)
        loss = LossCounters(n_dropped=n, moved_weight=n / 8)
        now = Traffic(host, now.device, PrefetchCounters(n_used=7, mode=2), loss)
    meter.settle()
    for name in ("n_hits", "bytes_read"):
        assert sum(getattr(one.traffic.host, name) for one in costs) == getattr(now.host, name)
    assert sum(one.traffic.loss.n_dropped for one in costs) == now.loss.n_dropped
    assert abs(sum(one.traffic.loss.moved_weight for one in costs) - now.loss.moved_weight) < 1e-9
    assert costs[0].traffic.ahead.mode == 2


def test_who_asked_for_twice_as_much_has_twice_the_share() -> None:
    now = Traffic()
    meter = Meter(lambda: now, lambda: None)
    meter.restart()
    one, other, idle = Costs(), Costs(), Costs()
    meter.begin([Share(one, 2), Share(other, 4, lossy=4), Share(idle, 0)])
    now = Traffic(Counters(bytes_read=600, resident_bytes=5), loss=LossCounters(n_dropped=3))
    meter.settle()
    assert (one.traffic.host.bytes_read, other.traffic.host.bytes_read) == (200, 400)
    assert idle.traffic.host.bytes_read == 0
    assert (one.traffic.loss.n_dropped, other.traffic.loss.n_dropped) == (0, 3)
    assert one.traffic.host.resident_bytes == 5


def grown(most: int, speed: dict[int, float], n_windows: int) -> list[int]:
    """How many were made at once after each window, where so many together make ``speed`` tokens a second."""
    rule, seen = Growth(most), []
    for _ in range(n_windows):
        for _ in range(WINDOW):
            rule.observe(rule.now, rule.now, rule.now / speed[rule.now])
        seen.append(rule.now)
    return seen


def test_more_are_made_while_all_together_are_faster() -> None:
    assert grown(8, {2: 10, 4: 14, 8: 20}, 5)[-1] == 8
    assert set(grown(8, {2: 10, 4: 10.2, 8: 20}, 5)[1:]) == {2}  # 4 win nothing
    assert grown(6, {2: 10, 4: 14, 6: 14}, 4)[-1] == 4
    assert 4 in grown(8, {2: 10, 4: 9}, 5 + FIRST_PAUSE)[5:]  # after a while it is tried again


def test_more_that_are_not_foreseen_to_be_faster_are_tried_rarely() -> None:
    """But they are: what is foreseen may be wrong."""
    speed = {2: 10.0, 4: 14.0, 8: 20.0}
    rule, seen = Growth(8, foresee=lambda n: 1.0 / n), []
    for _ in range(600):
        for _ in range(WINDOW):
            rule.observe(rule.now, rule.now, rule.now / speed[rule.now])
        seen.append(rule.now)
    assert set(seen[:FIRST_PAUSE]) == {2}
    assert seen[-1] == 8
    assert grown(8, speed, 5)[-1] == 8
    known = Growth(8, foresee=speed.get)
    for _ in range(3 * WINDOW):
        known.observe(known.now, known.now, known.now / speed[known.now])
    assert known.now == 8


def test_what_is_no_full_load_says_nothing() -> None:
    rule = Growth(8)
    for _ in range(10 * WINDOW):
        rule.observe(1, 1, 1.0)
    assert rule.now == 2
