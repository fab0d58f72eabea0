"""The priced rungs of a calibrated file: bytes against KL at a few budgets, and their lower hull.

Pure arithmetic, and the reading of ``mobile.loss.json``, which ``mobile-gguf calibrate`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.words import EXACT

from ..passes.decode import Policy
from ..passes.rungs import parse_rung
from .loss_model import LossModel, loss_model_of, number_of

# What any rung costs: rounding makes of exact's own divergence a little more than 0.
_LEAST = 1e-9


@dataclass(frozen=True)
class Offer:
    """A rung at a budget: what it costs in nats, and the bytes that are missed, both a token.

    ``factor`` is that of what is foreseen of its tokens' own part (``loss_model``).
    """

    rung: str
    kl: float
    n_bytes: float
    factor: float = 1.0

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.kl, self.n_bytes, self.factor


def lower_hull(offers: Sequence[Offer]) -> list[Offer]:
    """The offers that no mixture of two others beats, from the dearest in bytes on; KL ascends.

    A mixture runs some tokens by one rung and some by the other, so it lies on the line between them.
    """
    hull: list[Offer] = []
    for offer in sorted(offers, key=lambda one: (one.kl, one.n_bytes)):
        if hull and offer.n_bytes >= hull[-1].n_bytes:
            continue
        while len(hull) > 1 and _saves(hull[-2], hull[-1]) <= _saves(hull[-2], offer):
            hull.pop()
        hull.append(offer)
    return hull


def hull_of(offers: Sequence[Offer]) -> list[Offer]:
    """The lower hull of offers, exact first, which loses nothing whatever rounding says."""
    exact = next(offer for offer in offers if offer.rung == EXACT)
    others = [replace(one, kl=max(one.kl, _LEAST)) for one in offers if one is not exact]
    return lower_hull([replace(exact, kl=0.0), *others])


def _saves(one: Offer, other: Offer) -> float:
    """Bytes that a nat saves from one to the other."""
    return (one.n_bytes - other.n_bytes) / max(other.kl - one.kl, 1e-12)


@dataclass(frozen=True)
class PriceList:
    """What calibration found: offers by the share of all experts that a budget holds, ascending."""

    offers: dict[float, list[Offer]]
    model: LossModel

    def at(self, share: float) -> list[Offer]:
        """The offers at a budget, along the line between those measured; beyond them the nearest ones."""
        shares = list(self.offers)
        below = max((one for one in shares if one <= share), default=shares[0])
        above = min((one for one in shares if one >= share), default=shares[-1])
        if below == above:
            return self.offers[below]
        part = (share - below) / (above - below)
        there = {offer.rung: offer for offer in self.offers[above]}
        found = []
        for one in self.offers[below]:
            if (other := there.get(one.rung)) is not None:
                numbers = zip(one.numbers, other.numbers, strict=True)
                found.append(Offer(one.rung, *(low + part * (high - low) for low, high in numbers)))
        return found

    def hull(self, share: float) -> list[Offer]:
        """The lower hull at a budget, exact first."""
        return hull_of(self.at(share))

    def model_at(self, share: float) -> LossModel:
        """What is foreseen of tokens at a budget."""
        factors = {offer.rung: offer.factor for offer in self.at(share)}
        return replace(self.model, of_rungs=factors)

    def missed_at(self, share: float, kl: float) -> float:
        """The bytes missed at a budget for ``kl`` nats a token, as a share of those of exact."""
        hull = self.hull(share)
        if hull[0].n_bytes <= 0:
            return 1.0
        above = next((i for i, offer in enumerate(hull) if offer.kl > kl), len(hull))
        one = hull[above - 1]
        n_bytes = one.n_bytes
        if above < len(hull):
            n_bytes -= (kl - one.kl) * _saves(one, hull[above])
        return n_bytes / hull[0].n_bytes

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "model": self.model.to_dict(),
            "budgets": [
                {"share": share, "rungs": [vars(offer) for offer in offers]}
                for share, offers in self.offers.items()
            ],
        }


def is_switchable(policy: Policy) -> bool:
    """Whether ``auto`` may take it for one token and another for the next, and can count what it lost."""
    return policy.mode == EXACT


def read_prices(info: GgufInfo) -> PriceList | None:
    """The prices in a model's file; None if it has none. Raises ModelFormatError if they are damaged."""
    text = info.metadata.get(keys.LOSS_JSON)
    if text is None:
        return None
    try:
        facts = json.loads(text) if isinstance(text, str) else None
        return _prices(info, facts)
    except (json.JSONDecodeError, RecursionError, UsageError, ModelFormatError) as error:
        raise ModelFormatError(
            f"the prices of rungs in {info.path} cannot be used: {error}; calibrate it again"
        ) from None


def _prices(info: GgufInfo, facts: Any) -> PriceList:
    budgets = facts.get("budgets") if isinstance(facts, dict) else None
    if not isinstance(budgets, list) or not budgets:
        raise ModelFormatError("there are none")
    model = loss_model_of(facts.get("model"))
    offers: dict[float, list[Offer]] = {}
    for budget in budgets:
        if not isinstance(budget, dict) or not isinstance(budget.get("rungs"), list):
            raise ModelFormatError(f"a budget is {budget!r:.60}")
        offers[number_of(budget.get("share"), "a budget's share")] = [
            _offer(info, rung) for rung in budget["rungs"]
        ]
    if any(EXACT not in (offer.rung for offer in row) for row in offers.values()):
        raise ModelFormatError("a budget has no price of exact")
    return PriceList(dict(sorted(offers.items())), model)


def _offer(info: GgufInfo, facts: Any) -> Offer:
    if not isinstance(facts, dict) or not isinstance(facts.get("rung"), str):
        raise ModelFormatError(f"a rung is {facts!r:.60}")
    rung = parse_rung(facts["rung"], info, None)
    if not is_switchable(rung.policy):
        raise ModelFormatError(f"{rung.name!r:.60} is no rung of the ladder")
    names = ("kl", "n_bytes", "factor")
    return Offer(rung.name, *(number_of(facts.get(name), f"{name} of {rung.name}") for name in names))
