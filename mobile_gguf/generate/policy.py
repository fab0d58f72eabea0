"""Which tokens are big: the decoding policy that options ask for and a model allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mobile_gguf.engine.binding import needs_engine
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import DEFAULT_GAMMA, LoadOptions
from mobile_gguf.options.words import BIG_LITTLE, CONFIDENCE, EXACT, HEAD, OFF, ON

from .backend import Backend
from .decode import Policy, default_little_k

if TYPE_CHECKING:
    from .head import Head


def choose_policy(
    options: LoadOptions, info: GgufInfo, backend: Backend, notify: Callable[[str], object]
) -> Policy:
    """The Policy of ``options`` on this model; what can have no effect is left out of it, with a notice.

    Raises UsageError where the mode or a rule cannot be had in this way, EngineError on a stock llama.cpp.
    """
    policy = _by_mode(options, info, backend, notify)
    return replace(policy, loss=_loss_rules(options, info, backend, policy.little_k, notify))


def _by_mode(
    options: LoadOptions, info: GgufInfo, backend: Backend, notify: Callable[[str], object]
) -> Policy:
    mode, gamma, little_k = options.mode, options.gamma, options.little_k
    head = backend.head if mode == BIG_LITTLE and options.importance != CONFIDENCE else None
    top_k = info.n_expert_used
    default_k = head.little_k if head is not None else default_little_k(top_k)
    k = min(little_k, top_k) if little_k is not None else default_k
    if mode == EXACT:
        return Policy(EXACT, gamma, k)
    if (reason := _no_effect(info, backend, k, little_k)) is not None:
        notify(f"{reason}: mode {mode} has no effect")
        return Policy(EXACT, gamma, k)
    if not backend.has_engine:
        raise needs_engine(f"mode {mode}")
    if head is not None:
        return _head_policy(head, options, k, notify)
    if mode == BIG_LITTLE and options.importance == HEAD:
        raise UsageError(
            f"{info.path.name} has no importance head: run `mobile-gguf calibrate {info.path}`, "
            "or use importance confidence"
        )
    if mode == BIG_LITTLE and not backend.can_step_back:
        if backend.head is not None:
            remedy = "use importance head, which this file has"
        else:
            remedy = f"run `mobile-gguf calibrate {info.path}` for an importance head, which needs one pass"
        raise UsageError(
            f"mode big-little by confidence runs a position twice, and the memory of a {info.architecture} "
            f"model cannot be rolled back: {remedy}, or mode exact or little"
        )
    return Policy(mode, gamma, k)


def _no_effect(info: GgufInfo, backend: Backend, k: int, asked: int | None) -> str | None:
    """Why fewer experts per token are impossible or no saving, if they are."""
    top_k = info.n_expert_used
    if not info.is_moe:
        return f"{info.path.name} has no experts"
    if top_k <= 1:
        return f"{info.path.name} routes every token to one expert"
    if k >= top_k:
        return f"--little-k {asked} is not below this model's top-k, {top_k}"
    if backend.store is None and backend.has_engine:
        return f"the engine cannot hold the experts of a {info.architecture} model"
    return None


def _loss_rules(
    options: LoadOptions, info: GgufInfo, backend: Backend, little_k: int, notify: Callable[[str], object]
) -> LossRules | None:
    """The rules for missing experts that ``options`` ask for; None: none."""
    rules = LossRules(
        drop=options.drop,
        little_on_miss=little_k if options.little_on_miss == ON else 0,
        substitute=options.substitute,
    )
    if not rules.is_on:
        return None
    asked = {
        f"--drop {options.drop:g}": rules.drop > 0,
        "--little-on-miss on": rules.little_on_miss > 0,
        f"--substitute {rules.substitute}": rules.substitute != OFF,
    }
    flags = " and ".join(flag for flag, is_on in asked.items() if is_on)
    if not backend.has_engine:
        raise needs_engine(flags)
    reason = None
    if not info.is_moe:
        reason = f"{info.path.name} has no experts"
    elif info.n_expert_used <= rules.keep:
        reason = (
            f"{info.path.name} uses {info.n_expert_used} experts a token, and the {rules.keep} heaviest stay"
        )
    elif backend.store is None:
        reason = f"the engine cannot hold the experts of a {info.architecture} model"
    if reason is not None:
        notify(f"{reason}: {flags} has no effect")
        return None
    if rules.needs_buddies and backend.buddies is None:
        raise UsageError(
            f"{info.path.name} has no buddies: run `mobile-gguf calibrate {info.path}`, "
            "or use --substitute live or prior"
        )
    return rules


def _head_policy(head: Head, options: LoadOptions, little_k: int, notify: Callable[[str], object]) -> Policy:
    if options.gamma != DEFAULT_GAMMA:
        notify("the importance head decides: gamma has no effect without --importance confidence")
    own = options.head_threshold
    threshold = head.threshold if own is None else own
    return Policy(BIG_LITTLE, options.gamma, little_k, importance=HEAD, head_threshold=threshold)
