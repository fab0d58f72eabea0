"""Which tokens are big: the decoding policy that options ask for and a model allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mobile_gguf.engine.binding import needs_engine
from mobile_gguf.errors import UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import DEFAULT_GAMMA, LoadOptions
from mobile_gguf.options.words import AUTO_MODE, BIG_LITTLE, CONFIDENCE, EXACT, HEAD, ON

from ..backend import Backend
from ..passes.corrections import best_correction
from ..passes.decode import Policy, default_little_k
from .auto_policy import auto_policy
from .choosing import choose_speculation
from .loss_rules import loss_rules, prompt_rules

if TYPE_CHECKING:
    from ..passes.head import Head


def choose_policy(
    options: LoadOptions, info: GgufInfo, backend: Backend, notify: Callable[[str], object]
) -> Policy:
    """The Policy of ``options`` on this model; what can have no effect is left out of it, with a notice.

    Raises UsageError where the mode or a rule cannot be had in this way, EngineError on a stock llama.cpp.
    """
    policy = _by_mode(options, info, backend, notify)
    if options.little_correction == ON:
        policy = _corrected(options, info, backend, policy, notify)
    policy = _with_loss(options, info, backend, policy, notify)
    if options.deterministic and policy.may_lose and backend.device is not None:
        notify(
            "what is missing on a device depends on when uploads end: answers that lose experts are not the "
            "same each time, --deterministic or not; --vram-budget off has them so"
        )
    return replace(policy, speculate=choose_speculation(options, info, backend, policy, notify))


def _corrected(
    options: LoadOptions, info: GgufInfo, backend: Backend, policy: Policy, notify: Callable[[str], object]
) -> Policy:
    """With what makes up for the experts of little tokens, and the mass that goes with it."""
    if policy.mode == EXACT:
        notify(f"--little-correction on has no effect: no token is little in mode {options.mode}")
        return policy
    found = best_correction(info, backend.corrections, policy.little_k)
    return replace(policy, correction=found, mass=found.mass)


def _with_loss(
    options: LoadOptions, info: GgufInfo, backend: Backend, policy: Policy, notify: Callable[[str], object]
) -> Policy:
    prompt_loss = prompt_rules(options, info, backend, notify)
    if options.mode == AUTO_MODE:
        return replace(auto_policy(options, info, backend, policy, notify), prompt_loss=prompt_loss)
    loss = loss_rules(options, info, backend, policy.little_k, notify)
    if options.max_kld is not None and (policy.mode != EXACT or loss is not None):
        notify(f"--max-kld {options.max_kld:g} has no effect: only --mode auto keeps to it")
    return replace(policy, loss=loss, prompt_loss=prompt_loss)


def _by_mode(
    options: LoadOptions, info: GgufInfo, backend: Backend, notify: Callable[[str], object]
) -> Policy:
    mode, gamma, little_k = options.mode, options.gamma, options.little_k
    head = backend.head if mode == BIG_LITTLE and options.importance != CONFIDENCE else None
    top_k = info.n_expert_used
    default_k = head.little_k if head is not None else default_little_k(top_k)
    k = min(little_k, top_k) if little_k is not None else default_k
    if mode in (EXACT, AUTO_MODE):
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


def _head_policy(head: Head, options: LoadOptions, little_k: int, notify: Callable[[str], object]) -> Policy:
    if options.gamma != DEFAULT_GAMMA:
        notify("the importance head decides: gamma has no effect without --importance confidence")
    own = options.head_threshold
    threshold = head.threshold if own is None else own
    return Policy(BIG_LITTLE, options.gamma, little_k, importance=HEAD, head_threshold=threshold)
