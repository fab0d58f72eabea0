"""What a model's own block for multi-token prediction (MTP) has of a plan's sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.demand import Demand
from mobile_gguf.memory.fit import Fit, host_demand
from mobile_gguf.sizes import format_bytes


@dataclass(frozen=True)
class Block:
    """Its weights, keys and values and buffers, and its routed experts; bytes."""

    demand: Demand
    expert_bytes: int

    def __str__(self) -> str:
        return f"{self.demand}, experts {format_bytes(self.expert_bytes)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "dense_bytes": self.demand.dense_bytes,
            "kv_bytes": self.demand.kv_bytes,
            "compute_bytes": self.demand.compute_bytes,
            "expert_bytes": self.expert_bytes,
        }


def block_of(info: GgufInfo, loaded: GgufInfo, fit: Fit) -> Block | None:
    """That of ``loaded``, which is ``info`` with it; None if it is loaded without."""
    if not loaded.runs_mtp:
        return None
    own = host_demand(loaded, fit.asked) - host_demand(info, fit.asked)
    return Block(own, info.mtp_expert_bytes)
