"""Which rules for missing experts options ask for, and what a model allows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mobile_gguf.engine.binding import needs_engine
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import OFF, ON

from ..backend import Backend


def asked_flags(options: LoadOptions) -> str:
    """The rungs that ``options`` ask for, as flags; empty: none."""
    asked = {
        f"--drop {options.drop:g}": options.drop > 0,
        "--little-on-miss on": options.little_on_miss == ON,
        f"--substitute {options.substitute}": options.substitute != OFF,
        f"--partial {options.partial:g}": options.partial > 0,
    }
    return " and ".join(flag for flag, is_on in asked.items() if is_on)


def loss_rules(
    options: LoadOptions, info: GgufInfo, backend: Backend, little_k: int, notify: Callable[[str], object]
) -> LossRules | None:
    """The rules for missing experts that ``options`` ask for; None: none."""
    rules = LossRules(
        drop=options.drop,
        little_on_miss=little_k if options.little_on_miss == ON else 0,
        substitute=options.substitute,
        partial=options.partial,
        admit=admits(options),
    )
    if rules.partial > 0 and info.is_moe and info.segments == 1:
        notify(
            f"{info.path.name} holds its experts whole: --partial {options.partial:g} has no effect; "
            "`mobile-gguf convert --segments` makes a file of segments"
        )
        rules = replace(rules, partial=0.0)
    if not rules.is_on:
        return None
    flags = asked_flags(options)
    if not backend.has_engine:
        raise needs_engine(flags)
    if (reason := nothing_to_lose(info, backend, rules)) is not None:
        notify(f"{reason}: {flags} has no effect")
        return None
    if rules.needs_buddies and backend.buddies is None:
        raise UsageError(
            f"{info.path.name} has no buddies: run `mobile-gguf calibrate {info.path}`, "
            "or use --substitute live or prior"
        )
    return rules


def admits(options: LoadOptions) -> int:
    """How many displaced experts a layer and token are read while the disk is idle: none where no clock may
    have a say in what is there."""
    return 0 if options.deterministic else LossRules.admit


def prompt_rules(
    options: LoadOptions, info: GgufInfo, backend: Backend, notify: Callable[[str], object]
) -> LossRules | None:
    """The rules for a prompt's missing experts; None: none."""
    if options.prompt_drop <= 0:
        return None
    flag = f"--prompt-drop {options.prompt_drop:g}"
    if not backend.has_engine:
        raise needs_engine(flag)
    rules = LossRules(prompt_drop=options.prompt_drop, admit=admits(options))
    if (reason := nothing_to_lose(info, backend, rules)) is not None:
        notify(f"{reason}: {flag} has no effect")
        return None
    return rules


def nothing_to_lose(info: GgufInfo, backend: Backend, rules: LossRules) -> str | None:
    """Why rules for missing experts can do nothing, if they can not."""
    name = info.path.name
    if not info.is_moe:
        return f"{name} has no experts"
    if info.n_expert_used <= rules.keep:
        return f"{name} uses {info.n_expert_used} experts a token, and the {rules.keep} heaviest stay"
    if backend.store is None and backend.has_engine:
        return f"the engine cannot hold the experts of a {info.architecture} model"
    return None
