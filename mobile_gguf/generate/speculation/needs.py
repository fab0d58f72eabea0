"""How many experts a draft may want: half of those that there is room for, the others are of tokens before.

Different experts are meant, summed over the layers.
"""

from __future__ import annotations

from mobile_gguf.engine.structs import ModelInfo
from mobile_gguf.options.words import LITTLE

from ..passes.decode import Policy
from .costs import UNION


def share_in_memory(store: ModelInfo | None) -> float:
    """The share of the experts that memory has room for, as the store is now."""
    return min(1.0, store.budget_bytes / store.budget_all_bytes) if store is not None else 1.0


def most_needs(store: ModelInfo) -> float:
    """What a pass may want; where all experts stay there is no limit."""
    share = share_in_memory(store)
    return store.n_layer_moe * store.n_expert * share / 2 if share < 1.0 else float("inf")


def token_needs(store: ModelInfo, policy: Policy) -> int:
    """What a token wants."""
    return store.n_layer_moe * (policy.little_k if policy.mode == LITTLE else store.n_expert_used)


def has_room(store: ModelInfo, policy: Policy) -> bool:
    """Whether a draft of one token may be made, as far as is known before any was."""
    return token_needs(store, policy) * 2**UNION <= most_needs(store)
