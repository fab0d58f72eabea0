"""Fitting what a lossy pass probably costs (``generate/loss_model.py``) to priced rungs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mobile_gguf.generate.loss_model import MOST, LossModel
from mobile_gguf.generate.pricing import COLUMNS, Priced

Floats = npt.NDArray[np.float64]
KL, MOVED, SPREAD, STEP_KL, BEFORE = (
    COLUMNS.index(name) for name in ("kl", "moved", "spread", "step_kl", "before")
)
_HISTORIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_POWERS = (0.25, 2.5)  # what is believed of a power
_LEAST_DEVIATION = 0.05  # between texts; fewer blocks than it takes show nothing smaller
_MIN_POSITIONS = 32


def fit_loss_model(priced: Mapping[str, Sequence[Priced]], audited: Mapping[str, Priced]) -> LossModel | None:
    """The LossModel of rungs' positions at all budgets, and of those that were audited; None: too few.

    Powers by Poisson regression, which gets means right however heavy the tails are.
    """
    of_rung = {
        name: np.concatenate([rows for one in of for rows in one.positions]) for name, of in priced.items()
    }
    every = np.concatenate(list(of_rung.values())) if of_rung else np.zeros((0, len(COLUMNS)))
    lost = every[(every[:, MOVED] > 0) & (every[:, SPREAD] > 0)]
    steps = (
        np.concatenate([rows for one in audited.values() for rows in one.positions]) if audited else lost[:0]
    )
    steps = steps[~np.isnan(steps[:, STEP_KL]) & (steps[:, MOVED] > 0) & (steps[:, SPREAD] > 0)]
    if len(lost) < _MIN_POSITIONS or len(steps) < _MIN_POSITIONS or lost[:, KL].sum() <= 0:
        return None
    history, (spread_power, moved_power) = _history(lost)
    step_powers = _powers(steps[:, STEP_KL], steps[:, SPREAD], steps[:, MOVED])[0]
    model = LossModel(
        spread_power=spread_power, moved_power=moved_power, history=history,
        step_spread_power=step_powers[0], step_moved_power=step_powers[1],
    )  # fmt: skip
    whole = {name: _ratio(rows[:, KL], foreseen(model, name, rows)) for name, rows in of_rung.items()}
    own = {name: _own_ratio(model, name, one) for name, one in audited.items()}
    scale, step_scale = _mean(whole.values()), _mean(own.values())
    model = LossModel(
        **{name: getattr(model, name) for name in _SHAPE},
        scale=scale,
        step_scale=step_scale,
        of_rungs={
            name: (whole[name] / scale, own[name] / step_scale)
            for name in whole
            if whole[name] > 0 and own.get(name, 0) > 0
        },
    )
    token = _token_deviation(model, of_rung)
    return LossModel(
        **{name: getattr(model, name) for name in (*_SHAPE, "scale", "step_scale", "of_rungs")},
        token_deviation=token,
        text_deviation=_text_deviation(model, priced, token),
        audit_deviation=_audit_deviation(model, audited),
    )


_SHAPE = (
    "spread_power", "moved_power", "history", "step_spread_power", "step_moved_power",
)  # fmt: skip


def foreseen(model: LossModel, rung: str, rows: Floats) -> Floats:
    """``LossModel.whole`` of every position."""
    return np.array([model.whole(rung, row[SPREAD], row[MOVED], row[BEFORE]) for row in rows])


def foreseen_own(model: LossModel, rung: str, rows: Floats) -> Floats:
    """``LossModel.own`` of every position."""
    return np.array([model.own(rung, row[SPREAD], row[MOVED]) for row in rows])


def _history(rows: Floats) -> tuple[float, tuple[float, float]]:
    found = [
        (_powers(rows[:, KL], rows[:, SPREAD], rows[:, MOVED] + history * rows[:, BEFORE]), history)
        for history in _HISTORIES
    ]
    (powers, _deviance), history = min(found, key=lambda one: one[0][1])
    return history, powers


def _powers(kl: Floats, spread: Floats, lost: Floats) -> tuple[tuple[float, float], float]:
    """The powers of spread and of what was lost, and the deviance."""
    from sklearn.linear_model import PoissonRegressor

    x = np.log(np.stack([spread, lost], axis=1))
    x -= x.mean(0)
    y = kl / kl.mean()
    fit = PoissonRegressor(alpha=1e-4, max_iter=1000).fit(x, y)
    powers = np.clip(fit.coef_, *_POWERS)
    mean = np.exp(x @ powers)
    mean *= y.sum() / mean.sum()
    deviance = float((mean - y * np.log(mean)).mean())
    return (float(powers[0]), float(powers[1])), deviance


def _ratio(kl: Floats, forecast: Floats) -> float:
    return float(kl.sum() / forecast.sum()) if forecast.sum() > 0 else 0.0


def _own_ratio(model: LossModel, rung: str, priced: Priced) -> float:
    """The factor under which audits, drawn by forecast and cut at MOST times it, are 1 on average."""
    rows = np.concatenate(priced.positions)
    rows = rows[~np.isnan(rows[:, STEP_KL])]
    kl, forecast = rows[:, STEP_KL], foreseen_own(model, rung, rows)
    factor = _ratio(kl, forecast)
    for _ in range(20):
        factor = _ratio(np.minimum(kl, MOST * factor * forecast), forecast)
    return factor


def _mean(values: object) -> float:
    """The geometric mean of those that are above 0."""
    good = [value for value in values if value > 0]  # type: ignore[attr-defined]
    return math.exp(sum(map(math.log, good)) / len(good)) if good else 1.0


def _token_deviation(model: LossModel, of_rung: Mapping[str, Floats]) -> float:
    found = []
    for name, rows in of_rung.items():
        mean = rows[:, KL].mean()
        if mean > 0:
            found.append(np.sqrt(((rows[:, KL] - foreseen(model, name, rows)) ** 2).mean()) / mean)
    return float(np.median(found)) if found else LossModel.token_deviation


def _text_deviation(model: LossModel, priced: Mapping[str, Sequence[Priced]], token: float) -> float:
    """How far means of blocks are from what is foreseen of them, beyond the noise of so few tokens."""
    found = []
    for name, of in priced.items():
        for one in of:
            ratios = np.array([_ratio(rows[:, KL], foreseen(model, name, rows)) for rows in one.positions])
            if len(ratios) > 1 and (ratios > 0).all():
                noise = token**2 / np.mean([len(rows) for rows in one.positions])
                found.append((ratios / ratios.mean()).var(ddof=1) - noise)
    return max(_LEAST_DEVIATION, math.sqrt(max(0.0, float(np.mean(found))))) if found else 0.5


def _audit_deviation(model: LossModel, audited: Mapping[str, Priced]) -> float:
    """Of an audit's ratio to its forecast, drawn in proportion to the forecast."""
    total = weight = 0.0
    for name, one in audited.items():
        rows = np.concatenate(one.positions)
        rows = rows[~np.isnan(rows[:, STEP_KL])]
        forecast = foreseen_own(model, name, rows)
        rows, forecast = rows[forecast > 0], forecast[forecast > 0]
        ratios = np.minimum(rows[:, STEP_KL] / forecast, MOST)
        total += float((forecast * (ratios - 1) ** 2).sum())
        weight += float(forecast.sum())
    return max(0.1, math.sqrt(total / weight)) if weight > 0 else LossModel.audit_deviation
