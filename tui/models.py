"""Models at hand, with their sizes and whether they fit: what the model picker lists."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli.list import entries
from ..errors import MobileError
from ..gguf_info import read_gguf_info
from ..loading import context_size, plan_for
from ..options import LoadOptions, make_options
from ..sizes import format_bytes


@dataclass(frozen=True)
class Candidate:
    """A model that can be loaded by ``reference``; ``path`` is None for a demo that is not built yet."""

    reference: str
    path: Path | None
    n_bytes: int | None


@dataclass(frozen=True)
class Fit:
    """What the file says and how it fits: experts, and the share of them that may stay in memory."""

    architecture: str
    experts: str
    fit: str
    speed: str = ""


def candidates() -> list[Candidate]:
    """The models that ``mobile-gguf list`` knows, the demo among them."""
    found = []
    for entry in entries():
        path = Path(entry["path"]) if entry.get("path") else None
        found.append(Candidate(str(entry["name"]), path, entry.get("bytes")))
    return found


def fit_of(candidate: Candidate, options: dict[str, Any]) -> Fit:
    """How a model fits with these options on this machine, now; reads only the file's header.

    What cannot be read says so in ``fit``.
    """
    if candidate.path is None:
        return Fit("", "", "built when it is first loaded, in a minute or two")
    try:
        info = read_gguf_info(candidate.path)
    except MobileError as error:
        return Fit("", "", f"cannot be read: {error}")
    if not info.is_moe:
        return Fit(info.architecture, "no experts", "dense: must fit as a whole")
    experts = f"{info.n_expert} x {len(info.expert_layers)}, top-{info.n_expert_used}"
    try:
        load = make_options(LoadOptions, options)
        plan = plan_for(info, load, context_size(info, load.n_ctx))
    except MobileError as error:
        return Fit(info.architecture, experts, f"does not fit: {error}")
    total = plan.expert_bytes
    budget = plan.budget_bytes
    if budget == 0 or budget >= total:
        fit = f"fits: all {format_bytes(total)} of experts in RAM"
    else:
        fit = f"{100 * budget // max(1, total)}% of {format_bytes(total)} of experts in RAM"
    return Fit(info.architecture, experts, fit, predicted_speed(candidate.path, options))


def predicted_speed(path: Path, options: dict[str, Any]) -> str:
    """Predicted tokens/s from measurements that were made before; empty where there are none."""
    with contextlib.suppress(ImportError, AttributeError, MobileError, TypeError, ValueError):
        predict = importlib.import_module("mobile_gguf.plan").predict_cached
        predicted = predict(path, **options)
        if predicted is not None:
            return f"~{float(getattr(predicted, 'tokens_per_second', predicted)):.1f} tok/s"
    return ""
