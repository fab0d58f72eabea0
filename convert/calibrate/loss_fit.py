"""Fitting what a lossy pass probably costs (``generate/loss/loss_model.py``) to priced rungs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mobile_gguf.generate.loss.loss_model import MOST, LossModel
from mobile_gguf.generate.pricing import COLUMNS, Priced

Floats = npt.NDArray[np.float64]
KL, MOVED, SPREAD, STEP_KL, HISTORY_KL = (
    COLUMNS.index(name) for name in ("kl", "moved", "spread", "step_kl", "history_kl")
)
_POWERS = (0.25, 2.5)  # what is believed of a power
# ... and of what history adds to a token that loses something itself. It was measured from .4 to .8 in single
# blocks; that the two take something back of each other is not counted on, since the budget is to be kept.
_BESIDE = (1.0, 1.5)
_LEAST_DEVIATION = 0.05  # between texts; fewer blocks than it takes show nothing smaller
_MIN_POSITIONS = 32
_HALVINGS = 30


@dataclass(frozen=True)
class Fitted:
    """The model, and of each budget and rung the factor of what its tokens lose."""

    model: LossModel
    factors: dict[tuple[float, str], float]


def fit_loss_model(
    priced: Mapping[tuple[float, str], Priced], audited: Mapping[str, Priced], middle: float, n_prompt: int
) -> Fitted | None:
    """Fit to the positions of rungs at all budgets, and of those that were audited at one; None: too few.

    Every block begins with ``n_prompt`` tokens that lost nothing. Powers by Poisson regression, which gets
    means right however heavy the tails are, of both parts of what audits measured. Each rung at each budget
    has a factor of its own, under which all its tokens' KL is what it was.
    """
    steps = {name: _audited(_every(one)) for name, one in audited.items()}
    all_steps = np.concatenate([_NOTHING, *steps.values()])
    if len(all_steps) < _MIN_POSITIONS or not min(all_steps[:, [STEP_KL, HISTORY_KL]].sum(0)) > 0:
        return None
    powers = _powers([(of[:, STEP_KL], of[:, SPREAD], of[:, MOVED]) for of in steps.values()])
    model = LossModel(own_spread_power=powers[0], own_moved_power=powers[1])
    model = _with_history(model, audited, steps, n_prompt)
    found = {key: _factor(model, one, n_prompt) for key, one in priced.items()}
    factors = {key: factor for key, factor in found.items() if factor > 0}
    if not factors:
        return None
    model = replace(model, own_scale=_mean(factors.values()))
    factors = {key: factor / model.own_scale for key, factor in factors.items()}
    rungs = [(priced[key], _of_rung(model, factor)) for key, factor in factors.items()]
    blocks = [
        (one.positions, np.split(foreseen(of, one, n_prompt), _ends(one))) for one, of in rungs
    ]  # fmt: skip
    token = _token_deviation(blocks)
    mean, deviation = _audits(model, steps)
    return Fitted(
        replace(
            model,
            token_deviation=token,
            text_deviation=_text_deviation(blocks, token),
            audit_mean=mean,
            audit_deviation=deviation,
        ),
        factors,
    )


_NOTHING = np.empty((0, len(COLUMNS)))


def _with_history(
    model: LossModel, audited: Mapping[str, Priced], steps: Mapping[str, Floats], n_prompt: int
) -> LossModel:
    """The model with what it foresees of tokens because of those before them, of all rungs alike.

    Under one rung tokens have much the same before them: what that does shows between rungs.
    """
    found, added, alone = [np.empty((0, 3))], 0.0, 0.0
    for name, one in audited.items():
        rows = steps[name]
        forecast = foreseen_own(model, rows).sum()
        own = rows[:, STEP_KL].sum()
        if min(own, forecast) <= 0:
            continue
        # each rung says as much, however much it costs
        added += float((rows[:, KL] - rows[:, STEP_KL]).sum() / own)
        alone += float(rows[:, HISTORY_KL].sum() / own)
        before = lost_before(_of_rung(model, own / forecast), one, n_prompt)
        every = _every(one)
        good = (before > 0) & (every[:, SPREAD] > 0) & ~np.isnan(every[:, HISTORY_KL])
        found.append(np.stack([every[good, HISTORY_KL], every[good, SPREAD], before[good]], axis=1))
    kl, spread, before = np.concatenate(found).T
    if len(kl) < _MIN_POSITIONS or kl.sum() <= 0 or alone <= 0:
        return replace(model, history_scale=0.0)
    of_spread, of_before = _powers([(kl, spread, before)])
    return replace(
        model,
        history_scale=float(kl.sum() / (spread**of_spread * before**of_before).sum()),
        history_spread_power=of_spread,
        history_power=of_before,
        history_beside=float(np.clip(added / alone, *_BESIDE)),
    )


def _every(priced: Priced) -> Floats:
    return np.concatenate(priced.positions)


def _ends(priced: Priced) -> npt.NDArray[np.int_]:
    """Where in all positions blocks end, but for the last."""
    return np.cumsum([len(rows) for rows in priced.positions])[:-1]


def _audited(rows: Floats) -> Floats:
    """The positions that moved something and were run exactly as well."""
    return rows[(rows[:, MOVED] > 0) & (rows[:, SPREAD] > 0) & ~np.isnan(rows[:, STEP_KL])]


def _of_rung(model: LossModel, factor: float) -> LossModel:
    """The model of a rung with that factor."""
    return replace(model, own_scale=model.own_scale * factor)


def foreseen_own(model: LossModel, rows: Floats) -> Floats:
    """``LossModel.own`` of every position."""
    return np.array([model.own("", row[SPREAD], row[MOVED]) for row in rows])


def lost_before(model: LossModel, priced: Priced, n_prompt: int) -> Floats:
    """What the tokens before every position have lost on average; one that was run exactly has not."""
    found = []
    for rows in priced.positions:
        lost = np.array([model.lost("", row[MOVED]) for row in rows]) * np.isnan(rows[:, STEP_KL])
        found.append((np.cumsum(lost) - lost) / (n_prompt + np.arange(len(rows))))
    return np.concatenate(found)


def foreseen(model: LossModel, priced: Priced, n_prompt: int) -> Floats:
    """``LossModel.whole`` of every position."""
    before = lost_before(model, priced, n_prompt)
    rows = zip(_every(priced), before, strict=True)
    return np.array([model.whole("", row[SPREAD], row[MOVED], lost) for row, lost in rows])


def _factor(model: LossModel, priced: Priced, n_prompt: int) -> float:
    """Under which all of a rung's KL is what it was; 0: nothing was lost or moved."""
    rows = _every(priced)
    kl, own = float(rows[:, KL].sum()), float(foreseen_own(model, rows).sum())
    if kl <= 0 or own <= 0:
        return 0.0
    low, high = 0.0, kl / own
    for _ in range(_HALVINGS):
        factor = (low + high) / 2
        is_low = foreseen(_of_rung(model, factor), priced, n_prompt).sum() < kl
        low, high = (factor, high) if is_low else (low, factor)
    return high


def _powers(groups: Sequence[tuple[Floats, Floats, Floats]]) -> tuple[float, float]:
    """The powers of spread and of what was lost, of (KL, spread, lost) of each group."""
    from sklearn.linear_model import PoissonRegressor

    groups = [of for of in groups if len(of[0])]
    kl = np.concatenate([of[0] for of in groups])
    x = np.log(np.stack([np.concatenate([of[i] for of in groups]) for i in (1, 2)], axis=1))
    x -= x.mean(0)
    of_group = np.repeat(np.eye(len(groups)), [len(of[0]) for of in groups], axis=0)
    fit = PoissonRegressor(alpha=1e-5, max_iter=3000).fit(np.hstack([x, of_group]), kl / kl.mean())
    powers = np.clip(fit.coef_[:2], *_POWERS)
    return float(powers[0]), float(powers[1])


def _ratio(kl: Floats, forecast: Floats) -> float:
    return float(kl.sum() / forecast.sum()) if forecast.sum() > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    """The geometric mean of those that are above 0."""
    good = [math.log(value) for value in values if value > 0]
    return math.exp(sum(good) / len(good)) if good else 1.0


def _token_deviation(blocks: Sequence[tuple[Sequence[Floats], Sequence[Floats]]]) -> float:
    """Of single tokens, of positions and forecasts by rung and block."""
    found = []
    for positions, forecasts in blocks:
        kl, forecast = np.concatenate(positions)[:, KL], np.concatenate(forecasts)
        found.append(float(np.sqrt(((kl - forecast) ** 2).mean()) / kl.mean()))
    return float(np.median(found))


def _text_deviation(blocks: Sequence[tuple[Sequence[Floats], Sequence[Floats]]], token: float) -> float:
    """How far means of blocks are from what is foreseen of them, beyond the noise of so few tokens."""
    found = []
    for positions, forecasts in blocks:
        ratios = np.array(
            [_ratio(rows[:, KL], forecast) for rows, forecast in zip(positions, forecasts, strict=True)]
        )
        if len(ratios) > 1 and (ratios > 0).all():
            noise = token**2 / np.mean([len(rows) for rows in positions])
            found.append((ratios / ratios.mean()).var(ddof=1) - noise)
    least = _LEAST_DEVIATION
    return max(least, math.sqrt(max(0.0, float(np.mean(found))))) if found else LossModel.text_deviation


def _audits(model: LossModel, steps: Mapping[str, Floats]) -> tuple[float, float]:
    """Mean and deviation of audits' ratios to their forecasts, drawn in proportion to these and cut at MOST,
    of rungs whose forecasts are right on average; the deviation relative to the mean."""
    total = squares = weight = 0.0
    for rows in steps.values():
        forecast = foreseen_own(model, rows)
        if (ratio := _ratio(rows[:, STEP_KL], forecast)) <= 0:
            continue
        forecast *= ratio
        ratios = np.minimum(rows[:, STEP_KL] / forecast, MOST)
        total += float((forecast * ratios).sum())
        squares += float((forecast * ratios**2).sum())
        weight += float(forecast.sum())
    mean = total / weight
    return mean, max(0.1, math.sqrt(max(0.0, squares / weight - mean**2)) / mean)
