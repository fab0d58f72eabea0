"""Models at hand, with their sizes and whether they fit: what the model picker lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.listing import list_models, shares_text
from mobile_gguf.hub.resolve import DEMO, local_models, model_name
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.plan.known import Here
from mobile_gguf.sizes import format_bytes


@dataclass(frozen=True)
class Candidate:
    """A model that can be loaded by ``reference``; ``path`` is None for a demo that is not built yet."""

    reference: str
    path: Path | None
    n_bytes: int | None
    problem: str = ""


@dataclass(frozen=True)
class Fit:
    """What the file says and how it fits: experts, the shares of them in memory and on a device, speed."""

    architecture: str
    experts: str
    fit: str
    speed: str = ""


def candidates() -> list[Candidate]:
    """The models that ``mobile-gguf list`` knows.

    Looks into files: not for the screen's own thread.
    """
    return [
        Candidate(entry.name, entry.path if entry.info else None, entry.n_bytes, entry.problem)
        for entry in list_models()
    ]


def names() -> list[str]:
    """The demo and the models of the data directory, by their names alone."""
    return [DEMO, *map(model_name, local_models())]


def fit_of(candidate: Candidate, options: dict[str, Any], here: Here) -> Fit:
    """How a model fits with these options on this machine, now; reads only the file's header.

    What cannot be read says so in ``fit``.
    """
    if candidate.reference == DEMO and candidate.path is None:
        return Fit("", "", "built when it is first loaded, in a minute or two")
    if candidate.path is None or candidate.problem:
        return Fit("", "", candidate.problem or "no file")
    try:
        info = read_gguf_info(candidate.path)
    except MobileError as error:
        return Fit("", "", f"cannot be read: {error}")
    if not info.is_moe:
        return Fit(info.architecture, "no experts", "dense: must fit as a whole")
    experts = f"{info.n_expert} x {len(info.expert_layers)}, top-{info.n_expert_used}"
    try:
        load = make_options(LoadOptions, options)
        placed = here.fit(info, load)
    except MobileError as error:
        return Fit(info.architecture, experts, f"does not fit: {error}")
    if placed.warning:
        return Fit(info.architecture, experts, "the budget is more than is free now")
    fit = f"{format_bytes(info.expert_bytes)} of experts, {shares_text(placed)}"
    predicted = here.speed(info, placed, load)
    speed = f"about {predicted.predicted_tps:.1f} tok/s" if predicted is not None else ""
    prompts = here.prompts(info, placed, load)
    if speed and prompts:
        speed += f", prompts {prompts[-1].predicted_tps:.0f}"
    return Fit(info.architecture, experts, fit, speed)
