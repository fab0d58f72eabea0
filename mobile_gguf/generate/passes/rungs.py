"""What a rung is called: modes and lossy rules as one word, ``drop:0.75+prior:0.1``.

A calibrated file names its rungs so, and so does the command line of the judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mobile_gguf.engine.loss import OWN_TAU, RANDOM, LossRules
from mobile_gguf.errors import UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.words import BIG_LITTLE, BUDDY, CONFIDENCE, EXACT, HEAD, LITTLE, LIVE, PRIOR

from .corrections import Corrections, correction_of, read_corrections
from .decode import Policy, default_little_k

if TYPE_CHECKING:
    from .head import Head

# The rules by their words: which field the word sets besides a number behind its colon.
_RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "drop": ("drop", {}),
    "little-on-miss": ("little_on_miss", {}),
    BUDDY: ("tau", {"substitute": BUDDY}),
    "buddy-own": ("beta", {"substitute": BUDDY, "tau": OWN_TAU}),
    LIVE: ("margin", {"substitute": LIVE}),
    PRIOR: ("prior", {"substitute": PRIOR}),
    "segments": ("partial", {}),
    RANDOM: ("tau", {"substitute": RANDOM}),
    "random-own": ("beta", {"substitute": RANDOM, "tau": OWN_TAU}),
    "keep": ("keep", {}),
    "rho": ("substitutes_max", {}),
    "beta": ("beta", {}),
    "eta": ("eta", {}),
    "again": ("again_tokens", {}),
    "admit": ("admit", {}),
    "prompt-drop": ("prompt_drop", {}),
}
_WHOLE = {"little_on_miss", "keep", "substitutes_max", "again_tokens", "admit"}
_DEFAULTS = {"drop": 0.75, "partial": 0.01}  # any segment that is there
_MODES = (EXACT, LITTLE, HEAD, CONFIDENCE)


@dataclass(frozen=True)
class Rung:
    """A way of losing: its name, and the policy that decodes its tokens."""

    name: str
    policy: Policy


def head_shares(info: GgufInfo) -> dict[str, float]:
    """The head's thresholds in a calibrated file, by the share of tokens, in per cent, that are big."""
    return json.loads(info.metadata.get(keys.HEAD_THRESHOLDS, "{}"))


def parse_rung(
    text: str,
    info: GgufInfo,
    head: Head | None,
    shares: Mapping[str, float] | None = None,
    corrections: Corrections | None = None,
) -> Rung:
    """A Rung of parts joined by ``+``, a number behind a colon each.

    Modes: ``exact``, ``little:K``, ``head:SHARE`` of tokens that are big, in per cent, ``confidence:GAMMA``.
    Rules: ``drop:F``, ``little-on-miss:K``, ``buddy:TAU``, ``buddy-own:BETA`` with each layer's own tau,
    ``live:MARGIN``, ``prior:LAMBDA``, ``segments:SHARE`` of an expert that must be there, ``random:TAU``,
    ``random-own:BETA``, ``prompt-drop:F``; their settings ``keep:N``, ``mass:N`` (what kept weights are
    divided by), ``affine`` (little tokens are corrected by the calibrated map for their number of experts and
    that mass), ``rho:N``, ``beta:X``, ``eta:X``, ``again:TOKENS``, ``admit:N``. ``shares`` are the head's
    thresholds and ``corrections`` those of little tokens, by default the file's. Raises UsageError.
    """
    shares = head_shares(info) if shares is None else shares
    little_k = default_little_k(info.n_expert_used)
    policy, rules = Policy(EXACT, little_k=little_k), LossRules()
    is_affine = False
    for part in text.split("+"):
        word, _, number = part.strip().partition(":")
        value = _number(text, number) if number else None
        if word in _MODES:
            policy = _mode(text, word, value, policy, info, head, shares)
        elif word == "mass":
            policy = replace(policy, mass=int(value or 0))
        elif word == "affine":
            is_affine = True
        elif word in _RULES:
            field, fixed = _RULES[word]
            if value is None and word == "little-on-miss":
                value = policy.little_k
            if value is None and field in _DEFAULTS:
                value = _DEFAULTS[field]
            changes = dict(fixed)
            if value is not None:
                changes[field] = int(value) if field in _WHOLE else value
            rules = replace(rules, **changes)
        else:
            known = ", ".join([*_MODES, "mass", "affine", *_RULES])
            raise UsageError(f"{text!r} is no rung: {word!r} is none of {known}")
    if is_affine:
        if policy.mode == EXACT:
            raise UsageError(f"{text!r} is no rung: affine corrects little tokens, and it has none")
        found = read_corrections(info) if corrections is None else corrections
        policy = replace(policy, correction=correction_of(info, found, policy.little_k, policy.mass))
    if rules.prompt_drop > 0:
        policy = replace(policy, prompt_loss=LossRules(prompt_drop=rules.prompt_drop, keep=rules.keep))
        rules = replace(rules, prompt_drop=0.0)
    return Rung(text, replace(policy, loss=rules if rules.is_on else None))


def _mode(
    text: str,
    word: str,
    value: float | None,
    policy: Policy,
    info: GgufInfo,
    head: Head | None,
    shares: Mapping[str, float],
) -> Policy:
    if word == LITTLE:
        return replace(policy, mode=LITTLE, little_k=int(value or policy.little_k))
    if word == CONFIDENCE:
        gamma = policy.gamma if value is None else value
        return replace(policy, mode=BIG_LITTLE, importance=CONFIDENCE, gamma=gamma)
    if word == HEAD:
        if head is None:
            raise UsageError(f"{text!r} needs an importance head: run `mobile-gguf calibrate {info.path}`")
        threshold = head.threshold
        if value is not None:
            if str(int(value)) not in shares:
                raise UsageError(f"{text!r}: the file has thresholds for {', '.join(shares)} per cent")
            threshold = shares[str(int(value))]
        return replace(policy, mode=BIG_LITTLE, importance=HEAD, head_threshold=threshold)
    return policy


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise UsageError(f"{text!r} is no rung: {number!r} is no number") from None
