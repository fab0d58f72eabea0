"""The most steps that a contest of placements may take, from its rules alone."""

from __future__ import annotations

from mobile_gguf.device.contest import ARMS, Rules


def most_steps(rules: Rules) -> int:
    """Steps when no arm is dropped and no round left out."""
    return rules.rounds * sum(rules.block + rules.warmup(arm) for arm in ARMS)
