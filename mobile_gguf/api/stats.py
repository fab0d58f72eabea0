"""A loaded model's settings and counters, as ``Model.stats`` tells them."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_gguf.engine.structs import RESIDENT, Counters, DeviceCounters
from mobile_gguf.errors import MobileError
from mobile_gguf.generate.backend import Backend
from mobile_gguf.generate.passes.decode import Policy
from mobile_gguf.memory.split import split_of
from mobile_gguf.sizes import format_bytes

if TYPE_CHECKING:
    from .model import Model

_WIDTH = 32  # the longest name, and a gap


def stats_lines(stats: dict[str, Any]) -> list[str]:
    """What ``model_stats`` tells, for people: a line for each fact, bytes and times readable."""
    return [line for name, value in stats.items() for line in _lines(name, value)]


def _lines(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return ["", f"{name}:", *(f"  {line}" for key, item in value.items() for line in _lines(key, item))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [line for at, item in enumerate(value) for line in _lines(f"{name} {at}", item)]
    return [f"{name.replace('_', ' '):<{_WIDTH}}{_shown(name, value)}"]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and ("bytes" in name.split("_")):
        return format_bytes(value)
    if isinstance(value, (int, float)) and name.endswith("_us"):
        return f"{value / 1e3:.1f} ms"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def running_facts(model: Model) -> dict[str, Any]:
    """What may be asked of an open model from any thread: experts in memory, answers in the making.

    ``prompts`` is how many of the answers still have their prompts computed.
    """
    facts: dict[str, Any] = {}
    places = model.experts().places()
    if places is not None:
        facts = {"resident_experts": int((places.host == RESIDENT).sum()), "experts": int(places.host.size)}
        if places.device is not None:
            facts["device_experts"] = int((places.device == RESIDENT).sum())
    with contextlib.suppress(MobileError):  # it may be closed meanwhile
        crew = model.crew
        n_answers, n_prompts = crew.at_work
        facts |= {"answers": n_answers, "prompts": n_prompts, "most_answers": crew.most}
    return facts


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
    fit = getattr(backend, "fit", None)  # not of a scripted one
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
        "memory": split_of(fit) if fit is not None else None,
        "store": dataclasses.asdict(store) if store is not None else None,
        "counters": dataclasses.asdict(totals + backend.counters()),
        "prefetch": backend.prefetch_counters().to_dict() if store is not None else None,
        "warm": dataclasses.asdict(backend.warm_counters()) if store is not None else None,
        "split": dataclasses.asdict(backend.split) if backend.split is not None else None,
        "device": device.facts(device_totals + backend.device_counters()) if device is not None else None,
    }
