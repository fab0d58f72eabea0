"""Mode ``auto`` as options ask for it and a model allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mobile_gguf.engine.binding import needs_engine
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import DEFAULT_MAX_KLD, LoadOptions
from mobile_gguf.options.words import AUTO_MODE

from ..backend import Backend
from ..loss.auto import Auto
from ..loss.price_list import PriceList, read_prices
from ..passes.decode import Policy
from ..passes.rungs import parse_rung
from .loss_rules import admits, asked_flags, nothing_to_lose


def auto_policy(
    options: LoadOptions, info: GgufInfo, backend: Backend, exact: Policy, notify: Callable[[str], object]
) -> Policy:
    """The policy of mode auto; ``exact`` where nothing may be lost, or nothing can be known of it.

    Raises EngineError on a stock llama.cpp, ModelFormatError for damaged prices.
    """
    max_kld = DEFAULT_MAX_KLD if options.max_kld is None else options.max_kld
    if flags := asked_flags(options):
        notify(f"mode auto chooses the rungs itself: {flags} has no effect")
    if max_kld == 0:
        return exact
    if (reason := nothing_to_lose(info, backend, LossRules())) is not None:
        notify(f"{reason}: mode auto has no effect")
        return exact
    if not backend.has_engine:
        raise needs_engine("mode auto")
    auto = backend.auto
    if auto is None:
        auto = backend.auto = _make(info, backend, admits(options))
    name = info.path.name
    if not auto.is_calibrated and not auto.can_audit:
        notify(
            f"what rungs cost is not known of {name}, and the memory of a {info.architecture} model cannot "
            f"be rolled back to learn it: mode auto runs exactly; run `mobile-gguf calibrate {info.path}`"
        )
        return exact
    if not auto.is_calibrated:
        notify(
            f"what rungs cost is not known of {name}: mode auto runs exactly until it has learnt it; "
            f"`mobile-gguf calibrate {info.path}` measures it"
        )
    elif not auto.can_audit:
        notify(
            f"the memory of a {info.architecture} model cannot be rolled back: mode auto goes by what "
            "calibration found, without audits"
        )
    return replace(exact, mode=AUTO_MODE, max_kld=max_kld, auto=auto, mass=auto.mass)


def _make(info: GgufInfo, backend: Backend, admit: int) -> Auto:
    prices = read_prices(info)
    rules: dict[str, LossRules | None] = {}
    # as calibrated, all alike; what was not is best left as the model has it
    mass = 0 if prices is not None else info.n_expert_used
    if prices is not None:
        for offers in prices.offers.values():
            for offer in offers:
                policy = parse_rung(offer.rung, info, None).policy
                rules[offer.rung] = policy.loss
                mass = max(mass, policy.mass)
        if backend.buddies is None:
            prices = _without_buddies(prices, rules)
    return Auto(prices, rules, _share_there(backend), backend.can_step_back, mass, info.n_expert_used, admit)


def _without_buddies(prices: PriceList, rules: dict[str, LossRules | None]) -> PriceList:
    def is_good(rung: str) -> bool:
        of_rung = rules[rung]
        return of_rung is None or not of_rung.needs_buddies

    return replace(
        prices,
        offers={
            share: [offer for offer in offers if is_good(offer.rung)]
            for share, offers in prices.offers.items()
        },
    )


def _share_there(backend: Backend) -> float:
    """The share of all experts that memory has room for."""
    store = backend.store
    if store is None or store.budget_all_bytes <= 0:
        return 1.0
    share = store.budget_bytes / store.budget_all_bytes
    if share >= 1 and backend.device is not None:
        share = backend.device.budget_bytes / store.budget_all_bytes
    return min(share, 1.0)
