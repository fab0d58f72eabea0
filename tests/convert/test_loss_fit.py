"""What rungs cost, fitted to tokens whose two parts are known: their own, and what the memory lost before."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from mobile_gguf.convert.calibrate.loss_fit import Fitted, fit_loss_model, foreseen
from mobile_gguf.generate.loss.loss_model import LossModel
from mobile_gguf.generate.pricing import COLUMNS, Price, Priced

TRUE = LossModel(
    own_scale=0.2, own_spread_power=0.7, own_moved_power=1.1,
    history_scale=0.8, history_spread_power=1.2, history_power=0.9, history_beside=1.2,
)  # fmt: skip
FACTORS = {"drop:0.5": 0.5, "drop:1": 1.0, "prior:0.1": 2.0}
MOVED = {"drop:0.5": 0.03, "drop:1": 0.08, "prior:0.1": 0.05}
SHARES = (0.125, 0.25)
N_BLOCKS, N_TOKENS, N_PROMPT, EVERY = 6, 500, 16, 4
PRICE = Price("", "", *(0.0,) * (len(Price.__dataclass_fields__) - 2))


def of_rung(model: LossModel, rung: str, factor: float) -> LossModel:
    return replace(model, of_rungs={rung: factor})


@functools.cache
def priced(
    rung: str, share: float, seed: int, audited: bool, heavy: float = 1.0, of_texts: float = 0.0
) -> Priced:
    """Positions of a rung; a token's parts are what ``TRUE`` says, with gamma noise that deviates so."""
    rng = np.random.default_rng(seed)
    model = of_rung(TRUE, rung, FACTORS[rung])
    blocks = []
    for _block in range(N_BLOCKS):
        of_text = rng.gamma(of_texts**-2, of_texts**2) if of_texts else 1.0
        rows = np.full((N_TOKENS, len(COLUMNS)), np.nan)
        lost = 0.0
        for i, row in enumerate(rows):
            spread = rng.uniform(0.05, 0.95)
            moved = MOVED[rung] * rng.gamma(2.0, 0.5) * (2 if share < 0.2 else 1) * (rng.random() > 0.2)
            own, history = rng.gamma(heavy**-2, heavy**2, 2) * of_text
            own *= model.own(rung, spread, moved)
            history *= model.history(spread, lost / (N_PROMPT + i))
            kl = own + (TRUE.history_beside if moved > 0 else 1.0) * history
            is_audited = audited and i % EVERY == EVERY - 1
            columns = {"kl": kl, "moved": moved, "spread": spread}
            columns |= {"step_kl": own, "history_kl": history} if is_audited else {}
            for name, value in columns.items():
                row[COLUMNS.index(name)] = value
            lost += 0.0 if is_audited else model.lost(rung, moved)
        blocks.append(rows)
    return Priced(PRICE, blocks)


@functools.cache
def fit(**noise: float) -> Fitted:
    """Of texts that differ alike under every rung, as the same blocks do."""
    found = fit_loss_model(
        {(share, rung): priced(rung, share, 1, False, **noise) for share in SHARES for rung in FACTORS},
        {rung: priced(rung, 0.25, 2, True, **noise) for rung in FACTORS},
        0.25,
        N_PROMPT,
    )
    assert found is not None
    return found


def test_both_parts_are_found():
    fitted = fit()
    for name in ("own_spread_power", "own_moved_power", "history_spread_power", "history_power"):
        assert getattr(fitted.model, name) == pytest.approx(getattr(TRUE, name), abs=0.15)
    assert fitted.model.history_beside == pytest.approx(TRUE.history_beside, abs=0.1)
    for (share, rung), factor in fitted.factors.items():
        model, true = of_rung(fitted.model, rung, factor), of_rung(TRUE, rung, FACTORS[rung])
        moved = MOVED[rung] * (2 if share < 0.2 else 1)
        assert model.own(rung, 0.5, moved) == pytest.approx(true.own(rung, 0.5, moved), rel=0.15)
        before = model.lost(rung, moved)
        assert model.history(0.5, before) == pytest.approx(true.history(0.5, before), rel=0.25)
    assert set(fitted.factors) == {(share, rung) for share in SHARES for rung in FACTORS}


@pytest.mark.parametrize("rung", FACTORS)
def test_tokens_that_lose_nothing_are_foreseen_as_well_as_others(rung):
    """Where one power of moved and before together stood for both, they had a third of what they cost."""
    fitted = fit()
    of = priced(rung, 0.25, 9, False)
    forecast = foreseen(of_rung(fitted.model, "", fitted.factors[0.25, rung]), of, N_PROMPT)
    rows = np.concatenate(of.positions)
    kl, moved = rows[:, COLUMNS.index("kl")], rows[:, COLUMNS.index("moved")]
    for group in (moved == 0, moved > 0):
        assert forecast[group].sum() == pytest.approx(kl[group].sum(), rel=0.15)


def test_how_far_audits_and_texts_differ_is_found():
    steady, heavy = fit(), fit(heavy=2.0)
    assert steady.model.audit_deviation == pytest.approx(1.0, abs=0.15)
    assert steady.model.audit_mean == pytest.approx(1.0, abs=0.01)
    assert heavy.model.audit_deviation > steady.model.audit_deviation + 0.3
    # what is cut at MOST is made up for
    assert 0.9 < heavy.model.audit_mean < 0.98
    assert steady.model.text_deviation < 0.12
    assert fit(of_texts=0.4).model.text_deviation == pytest.approx(0.4, abs=0.25)


def test_of_too_few_positions_nothing_is_said():
    few = {
        rung: Priced(PRICE, [rows[:40] for rows in priced(rung, 0.25, 1, True).positions[:1]])
        for rung in FACTORS
    }
    assert fit_loss_model({(0.25, rung): one for rung, one in few.items()}, few, 0.25, N_PROMPT) is None
