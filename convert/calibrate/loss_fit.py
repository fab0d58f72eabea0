"""Fitting what a lossy pass probably costs (``generate/loss_model.py``) to priced rungs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Fitted:
    """The model, and of each budget and rung the factors of the whole and of a token's own part."""

    model: LossModel
    factors: dict[tuple[float, str], tuple[float, float]]


def fit_loss_model(
    priced: Mapping[tuple[float, str], Priced], audited: Mapping[str, Priced], middle: float
) -> Fitted | None:
    """Fit to the positions of rungs at all budgets, and of those that were audited at one; None: too few.

    Powers by Poisson regression, which gets means right however heavy the tails are; each rung at each budget
    has a factor of its own. What an audit sees is taken to be the same part of the whole at all budgets.
    """
    rows = {key: _lost(one) for key, one in priced.items()}
    steps = {name: _audited(one) for name, one in audited.items()}
    n_lost, n_steps = (sum(map(len, of.values())) for of in (rows, steps))
    if min(n_lost, n_steps) < _MIN_POSITIONS or sum(of[:, KL].sum() for of in rows.values()) <= 0:
        return None
    history, (spread_power, moved_power) = _history(list(rows.values()))
    step_powers = _powers([(of[:, STEP_KL], of[:, SPREAD], of[:, MOVED]) for of in steps.values()])[0]
    model = LossModel(
        spread_power=spread_power, moved_power=moved_power, history=history,
        step_spread_power=step_powers[0], step_moved_power=step_powers[1],
    )  # fmt: skip
    whole = {key: _ratio(_every(one)[:, KL], foreseen(model, _every(one))) for key, one in priced.items()}
    own = {name: _own_ratio(model, one) for name, one in audited.items()}
    scale, step_scale = _mean(whole.values()), _mean(own.values())
    factors = {}
    for (share, name), ratio in whole.items():
        there, here = whole.get((middle, name), 0.0), own.get(name, 0.0)
        if min(ratio, there, here) > 0:
            factors[share, name] = ratio / scale, here / step_scale * ratio / there
    model = replace(model, scale=scale, step_scale=step_scale)
    token = _token_deviation(model, priced, factors)
    return Fitted(
        replace(
            model,
            token_deviation=token,
            text_deviation=_text_deviation(model, priced, token),
            audit_deviation=_audit_deviation(model, audited, factors, middle),
        ),
        factors,
    )


def _every(priced: Priced) -> Floats:
    return np.concatenate(priced.positions)


def _lost(priced: Priced) -> Floats:
    rows = _every(priced)
    return rows[(rows[:, MOVED] > 0) & (rows[:, SPREAD] > 0)]


def _audited(priced: Priced) -> Floats:
    rows = _lost(priced)
    return rows[~np.isnan(rows[:, STEP_KL])]


def foreseen(model: LossModel, rows: Floats) -> Floats:
    """``LossModel.whole`` of every position, of a rung whose factor is 1."""
    return np.array([model.whole("", row[SPREAD], row[MOVED], row[BEFORE]) for row in rows])


def foreseen_own(model: LossModel, rows: Floats) -> Floats:
    """``LossModel.own`` of every position, likewise."""
    return np.array([model.own("", row[SPREAD], row[MOVED]) for row in rows])


def _history(groups: Sequence[Floats]) -> tuple[float, tuple[float, float]]:
    found = []
    for history in _HISTORIES:
        rows = [(of[:, KL], of[:, SPREAD], of[:, MOVED] + history * of[:, BEFORE]) for of in groups]
        powers, deviance = _powers(rows)
        found.append((deviance, history, powers))
    _least, history, powers = min(found)
    return history, powers


def _powers(groups: Sequence[tuple[Floats, Floats, Floats]]) -> tuple[tuple[float, float], float]:
    """The powers of spread and of what was lost, and the deviance, of (KL, spread, lost) of each group."""
    from sklearn.linear_model import PoissonRegressor

    groups = [of for of in groups if len(of[0])]
    kl = np.concatenate([of[0] for of in groups])
    x = np.log(np.stack([np.concatenate([of[i] for of in groups]) for i in (1, 2)], axis=1))
    x -= x.mean(0)
    of_group = np.repeat(np.eye(len(groups)), [len(of[0]) for of in groups], axis=0)
    y = kl / kl.mean()
    fit = PoissonRegressor(alpha=1e-5, max_iter=3000).fit(np.hstack([x, of_group]), y)
    mean = fit.predict(np.hstack([x, of_group]))
    powers = np.clip(fit.coef_[:2], *_POWERS)
    return (float(powers[0]), float(powers[1])), float((mean - y * np.log(mean)).mean())


def _ratio(kl: Floats, forecast: Floats) -> float:
    return float(kl.sum() / forecast.sum()) if forecast.sum() > 0 else 0.0


def _own_ratio(model: LossModel, priced: Priced) -> float:
    """The factor under which audits, drawn by forecast and cut at MOST times it, are 1 on average."""
    rows = _audited(priced)
    kl, forecast = rows[:, STEP_KL], foreseen_own(model, rows)
    factor = _ratio(kl, forecast)
    for _ in range(20):
        factor = _ratio(np.minimum(kl, MOST * factor * forecast), forecast)
    return factor


def _mean(values: Iterable[float]) -> float:
    """The geometric mean of those that are above 0."""
    good = [math.log(value) for value in values if value > 0]
    return math.exp(sum(good) / len(good)) if good else 1.0


def _token_deviation(
    model: LossModel,
    priced: Mapping[tuple[float, str], Priced],
    factors: Mapping[tuple[float, str], tuple[float, float]],
) -> float:
    found = []
    for key, (factor, _own) in factors.items():
        rows = _every(priced[key])
        errors = rows[:, KL] - factor * foreseen(model, rows)
        found.append(float(np.sqrt((errors**2).mean()) / rows[:, KL].mean()))
    return float(np.median(found)) if found else LossModel.token_deviation


def _text_deviation(model: LossModel, priced: Mapping[tuple[float, str], Priced], token: float) -> float:
    """How far means of blocks are from what is foreseen of them, beyond the noise of so few tokens."""
    found = []
    for one in priced.values():
        ratios = np.array([_ratio(rows[:, KL], foreseen(model, rows)) for rows in one.positions])
        if len(ratios) > 1 and (ratios > 0).all():
            noise = token**2 / np.mean([len(rows) for rows in one.positions])
            found.append((ratios / ratios.mean()).var(ddof=1) - noise)
    least = _LEAST_DEVIATION
    return max(least, math.sqrt(max(0.0, float(np.mean(found))))) if found else LossModel.text_deviation


def _audit_deviation(
    model: LossModel,
    audited: Mapping[str, Priced],
    factors: Mapping[tuple[float, str], tuple[float, float]],
    middle: float,
) -> float:
    """Of an audit's ratio to its forecast, drawn in proportion to the forecast."""
    total = weight = 0.0
    for name, one in audited.items():
        if (middle, name) not in factors:
            continue
        rows = _audited(one)
        forecast = factors[middle, name][1] * foreseen_own(model, rows)
        ratios = np.minimum(rows[:, STEP_KL] / forecast, MOST)
        total += float((forecast * (ratios - 1) ** 2).sum())
        weight += float(forecast.sum())
    return max(0.1, math.sqrt(total / weight)) if weight > 0 else LossModel.audit_deviation
