"""The ladder of lossy rules: Python's side of ``mobile_set_loss`` in ``patches/src/mobile.h``.

It says what becomes of an expert that a token asks for and that would have to be moved first. docs/loss.md
has the rules and what they cost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobile_gguf.options.words import BUDDY, LIVE, OFF, PRIOR

from .binding import Engine, choice
from .structs import (
    SUBSTITUTE,
    LossCounters,
    LossCountersStruct,
    LossParamsStruct,
    struct_fields,
    with_slack,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The control of an experiment, which no option offers.
RANDOM = "random"
# In the place of ``tau``: each layer's own, as its buddies have it.
OWN_TAU = -1.0


@dataclass(frozen=True)
class LossRules:
    """The rules in force, each off by default; the other values are those of the papers.

    ``drop``: a missing expert whose share of its token's weight is below ``drop``/top-k is not computed.
    ``little_on_miss``: of a token's experts, by weight, those beyond so many are computed only if they are
    there, or were asked for within the last ``again_tokens`` tokens, too. ``substitute`` puts an expert that
    is there in the place of one that is not: by ``buddy`` (BuddyMoE: where the entropy of the token's weights
    is above ``tau`` and the layer's share of missing experts below ``beta``, at most ``substitutes_max`` a
    token, the largest q(j|i) * (1 + ``eta`` z_j)), ``live`` (the likeliest one, of at least 1 - ``margin`` of
    the missing one's probability) or ``prior`` (Cache-Prior, lambda). The ``keep`` heaviest experts of a
    token are never touched. ``admit`` displaced experts a layer and token are read while the disk is idle.
    ``prompt_drop``: of tokens that are computed together, a missing expert whose share of all their weight in
    the layer is below it is not computed for any of them.
    ``partial``: before all these, a missing expert of which at least this share of its segments is there is
    computed with those alone.
    """

    drop: float = 0.0
    little_on_miss: int = 0
    again_tokens: int = 8
    substitute: str = OFF
    keep: int = 2
    substitutes_max: int = 3
    tau: float = 0.95
    beta: float = 0.6
    eta: float = 0.0
    margin: float = 0.25
    prior: float = 0.15
    admit: int = 1
    prompt_drop: float = 0.0
    partial: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether any rule is in force."""
        rules = (self.drop, self.little_on_miss, self.prompt_drop, self.partial)
        return any(rule > 0 for rule in rules) or self.substitute != OFF

    @property
    def reads_scores(self) -> bool:
        """Whether the router's own scores are looked at, which a replay does not have."""
        return self.substitute in (LIVE, PRIOR) or (self.substitute == BUDDY and self.eta != 0)

    @property
    def needs_buddies(self) -> bool:
        return self.substitute == BUDDY or (self.substitute == RANDOM and self.tau < 0)


@dataclass(frozen=True)
class Buddies:
    """Experts that may stand in for others, by the model's layer and expert numbers.

    ``experts`` int32 and ``shares`` float32 [n_layer, n_expert, n], the best first, -1 where there are no
    more; ``tau`` float32 [n_layer] is each layer's own threshold of the entropy.
    """

    experts: npt.NDArray[np.int32]
    shares: npt.NDArray[np.float32]
    tau: npt.NDArray[np.float32]


def set_loss(engine: Engine, ctx: int, rules: LossRules | None) -> None:
    """Put ``rules`` in force on ``ctx`` for tokens that may lose, None: none.

    Raises UsageError for a value out of range, EngineError where buddies are needed and have not been set.
    """
    if rules is None:
        engine.checked("set_loss", "ending the lossy rules", ctx, None)
        return
    params = with_slack(LossParamsStruct)
    for name in LossRules.__dataclass_fields__:
        value = getattr(rules, name)
        setattr(params, name, choice(name, SUBSTITUTE, value) if name == "substitute" else value)
    engine.checked("set_loss", "setting the lossy rules", ctx, ctypes.byref(params))


def set_lossy(engine: Engine, ctx: int, on: bool) -> None:
    """Whether the tokens from the next decode on may lose by the rules; those of a prompt must not."""
    engine.checked("set_lossy", "choosing which tokens may lose", ctx, on)


def set_batch_lossy(engine: Engine, ctx: int, lossy: Sequence[bool]) -> None:
    """The same for the next decode only, one value per token of its batch."""
    array = (ctypes.c_int32 * len(lossy))(*map(int, lossy))
    engine.checked("set_batch_lossy", "choosing which tokens may lose", ctx, array, len(lossy))


def set_buddies(engine: Engine, ctx: int, buddies: Buddies) -> None:
    """Name the experts that may stand in for others; raises UsageError if they do not fit the model."""
    import numpy as np

    n_layer, n_expert, n = buddies.experts.shape
    arrays = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in (
            (buddies.experts, np.int32),
            (buddies.shares, np.float32),
            (buddies.tau, np.float32),
        )
    ]
    pointers = [array.ctypes.data for array in arrays]
    engine.checked("set_buddies", "naming the buddies", ctx, *pointers, n_layer, n_expert, n)


def loss_counters(engine: Engine, ctx: int) -> LossCounters:
    """What the rules did on ``ctx`` since the last reset of its counters."""
    struct = with_slack(LossCountersStruct)
    engine.checked("get_loss_counters", "reading what was lost", ctx, ctypes.byref(struct))
    return LossCounters(**struct_fields(struct))


def token_loss(engine: Engine, ctx: int, i: int) -> LossCounters:
    """What the rules did to token ``i`` of the last decode's batch alone."""
    struct = with_slack(LossCountersStruct)
    engine.checked("get_token_loss", "reading what a token lost", ctx, i, ctypes.byref(struct))
    return LossCounters(**struct_fields(struct))


def moved_share(before: LossCounters, after: LossCounters) -> float:
    """The mean share of a token's weight in a layer that rules touched between two readings."""
    n_layers = after.n_layers - before.n_layers
    return (after.moved_weight - before.moved_weight) / n_layers if n_layers > 0 else 0.0
