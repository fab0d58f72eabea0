"""The lower hull of what rungs cost, between the budgets that were measured, and a damaged file."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from fake_backend import fake_info
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.generate.loss.loss_model import LossModel
from mobile_gguf.generate.loss.price_list import Offer, PriceList, lower_hull, read_prices
from mobile_gguf.gguf import keys

ROWS = [
    Offer("exact", 0.0, 100.0), Offer("drop:0.5", 0.01, 60.0), Offer("live:0.25", 0.005, 95.0),
    Offer("drop:1", 0.04, 30.0), Offer("buddy", 0.03, 70.0),
]  # fmt: skip
MODEL = LossModel(
    own_scale=0.3, own_moved_power=2.0, history_scale=4.0, history_power=2.0, history_beside=0.5,
    text_deviation=0.1,
)  # fmt: skip
PRICES = PriceList({0.125: ROWS, 0.5: [Offer(o.rung, o.kl / 2, o.n_bytes / 4, 3) for o in ROWS]}, MODEL)


def names(offers: list[Offer]) -> list[str]:
    return [offer.rung for offer in offers]


def test_the_hull_leaves_out_what_a_mixture_beats():
    # a mixture of exact and drop:0.5 at .005 nats misses 80 bytes
    assert names(lower_hull(ROWS)) == ["exact", "drop:0.5", "drop:1"]
    assert names(lower_hull(ROWS[:1])) == ["exact"]
    assert names(lower_hull([Offer("exact", 0, 100), Offer("drop:1", 0.1, 100)])) == ["exact"]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1000)), min_size=1, max_size=12))
def test_no_offer_is_below_the_hull(points):
    offers = [Offer(str(i), kl, n_bytes) for i, (kl, n_bytes) in enumerate(points)]
    hull = lower_hull(offers)
    assert [offer.kl for offer in hull] == sorted(offer.kl for offer in hull)
    assert [offer.n_bytes for offer in hull] == sorted((offer.n_bytes for offer in hull), reverse=True)
    for one, other in itertools.pairwise(hull):
        for offer in offers:
            if one.kl <= offer.kl <= other.kl and other.kl - one.kl > 1e-9:
                part = (offer.kl - one.kl) / (other.kl - one.kl)
                assert offer.n_bytes >= one.n_bytes + part * (other.n_bytes - one.n_bytes) - 1e-6


def test_between_two_budgets_prices_are_between_theirs():
    assert PRICES.at(0.125) == ROWS
    half = {offer.rung: offer for offer in PRICES.at(0.3125)}
    assert half["drop:1"].kl == pytest.approx(0.03)
    assert half["drop:1"].n_bytes == pytest.approx((30 + 7.5) / 2)
    assert half["drop:1"].factor == 2
    assert PRICES.model_at(0.3125).own("drop:1", 0.5, 0.1) == pytest.approx(2 * 0.3 * 0.5 * 0.1**2)
    assert PRICES.at(0.01) == ROWS
    assert names(PRICES.at(1.0)) == names(ROWS)


def test_what_a_budget_saves_is_along_the_hull():
    assert PRICES.missed_at(0.125, 0.0) == 1
    assert PRICES.missed_at(0.125, 0.005) == pytest.approx(0.8)
    assert PRICES.missed_at(0.125, 0.025) == pytest.approx(0.45)
    assert PRICES.missed_at(0.125, 9.0) == pytest.approx(0.3)
    nothing = PriceList({0.5: [Offer("exact", 0.0, 0.0)]}, MODEL)
    assert nothing.missed_at(0.5, 1.0) == 1


def test_what_the_memory_lost_adds_to_what_a_token_loses():
    model = PRICES.model_at(0.3125)
    lost = 2 * 0.3 * 0.1**2
    own, history = 0.5 * lost, 4.0 * 0.5 * 0.2**2
    assert (model.lost("drop:1", 0.1), model.lost("drop:1", 0.0)) == (pytest.approx(lost), 0)
    assert model.whole("drop:1", 0.5, 0.1, 0.0) == pytest.approx(own)
    assert model.whole("drop:1", 0.5, 0.0, 0.2) == pytest.approx(history)
    assert model.whole("exact", 0.5, 0.0, 0.2) == pytest.approx(history)
    assert model.whole("drop:1", 0.5, 0.1, 0.2) == pytest.approx(own + 0.5 * history)
    assert model.whole("drop:1", 0.0, 0.1, 0.2) == 0


def info_with(facts: Any):
    text = facts if isinstance(facts, str) else json.dumps(facts)
    return fake_info(metadata={keys.LOSS_JSON: text})


def test_a_file_gives_back_what_was_written():
    assert read_prices(info_with(PRICES.to_dict())) == PRICES
    assert read_prices(fake_info()) is None


GOOD = PRICES.to_dict()


@pytest.mark.parametrize(
    "facts",
    [
        "{",
        "[1]",
        {},
        GOOD | {"budgets": []},
        GOOD | {"budgets": [{"share": -1, "rungs": []}]},
        GOOD | {"budgets": [{"share": 0.1, "rungs": [{"rung": "drop:1", "kl": 1, "n_bytes": 1}]}]},
        GOOD | {"budgets": [{"share": 0.1, "rungs": [{"rung": "exact", "kl": "1", "n_bytes": 1}]}]},
        GOOD | {"budgets": [{"share": 0.1, "rungs": [{"rung": "nothing", "kl": 1, "n_bytes": 1}]}]},
        GOOD | {"budgets": [{"share": 0.1, "rungs": [{"rung": "little", "kl": 1, "n_bytes": 1}]}]},
        GOOD | {"model": None},
        GOOD | {"model": GOOD["model"] | {"own_scale": float("nan")}},
        GOOD | {"model": GOOD["model"] | {"audit_deviation": 0}},
        GOOD | {"model": GOOD["model"] | {"audit_mean": 0}},
        GOOD | {"budgets": [{"share": 0.1, "rungs": [{"rung": "exact", "kl": 0, "n_bytes": 1}]}]},
        "[" * 100000,
    ],
)
def test_damaged_prices_are_one_line(facts):
    with pytest.raises(ModelFormatError, match=r"cannot be used: .*; calibrate it again") as error:
        read_prices(info_with(facts))
    assert "\n" not in str(error.value)


def test_prices_of_an_older_version_say_so():
    """Their numbers have other meanings."""
    rungs = [{"rung": "exact", "kl": 0.0, "n_bytes": 1.0, "factor": 1.0, "own_factor": 1.0}]
    model = {"scale": 0.5, "history": 0.25, "step_scale": 0.2, "text_deviation": 0.1, "audit_deviation": 1.0}
    with pytest.raises(ModelFormatError, match=r"an older version measured them, .*; calibrate it again"):
        read_prices(info_with({"budgets": [{"share": 0.25, "rungs": rungs}], "model": model}))
