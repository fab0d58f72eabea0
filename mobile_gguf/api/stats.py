"""A loaded model's settings and counters, as ``Model.stats`` tells them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mobile_gguf.engine.structs import Counters, DeviceCounters
from mobile_gguf.generate.answer import Backend
from mobile_gguf.generate.decode import Policy


def model_stats(
    backend: Backend,
    path: Path,
    policy: Policy,
    *,
    n_expert_used: int,
    n_ctx: int,
    totals: Counters,
    device_totals: DeviceCounters,
) -> dict[str, Any]:
    """The facts; ``totals`` are the counters before the answer that runs or ran last."""
    store = backend.store
    device = backend.device
    return {
        "model": str(path),
        "engine": "mobile" if store is not None else "stock",
        "mode": policy.mode,
        "gamma": policy.gamma,
        "importance": policy.importance,
        "head_threshold": policy.head_threshold if policy.uses_head else None,
        "n_expert_used": n_expert_used,
        "little_k": policy.little_k,
        "n_ctx": n_ctx,
        "store": dataclasses.asdict(store) if store is not None else None,
        "counters": dataclasses.asdict(totals + backend.counters()),
        "prefetch": backend.prefetch_counters().to_dict() if store is not None else None,
        "device": device.facts(device_totals + backend.device_counters()) if device is not None else None,
    }
