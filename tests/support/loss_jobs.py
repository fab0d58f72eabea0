"""Lossy rules for jobs of ``engine_child``, what they find resident, and what Transformers makes of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import loss_oracle as oracle
import numpy as np
import tiny_models
from engine_jobs import tokens
from transformers_jobs import arrays_of

N_BUDDIES = 6
# how each family makes weights of its router's logits, and whether their sum is fixed
FAMILIES = {
    "qwen3moe": ("softmax", True),
    "olmoe": ("softmax", False),
    "qwen2moe": ("softmax", False),
    "deepseek3": ("sigmoid", True),
    "gpt-oss": ("chosen", True),
}
RULES: dict[str, dict[str, Any]] = {
    "drop": {"drop": 0.9},
    "drop more": {"drop": 2.0, "keep": 1},
    "little-on-miss": {"little_on_miss": 2, "again_tokens": 8},
    "buddy": {"substitute": oracle.BUDDY, "tau": 0.4, "beta": 1.1},
    "buddy of its own tau": {"substitute": oracle.BUDDY, "tau": -1.0, "beta": 0.8, "eta": 0.3, "keep": 0},
    "live": {"substitute": oracle.LIVE, "margin": 0.9},
    "prior": {"substitute": oracle.PRIOR, "prior": 0.3},
    "ladder": {"drop": 0.5, "little_on_miss": 3, "substitute": oracle.LIVE, "margin": 1.0, "keep": 1},
}


def scripted(model: str) -> dict[str, Any]:
    """Residents, buddies and thresholds of every layer of the model."""
    spec, rng = tiny_models.MODELS[model], np.random.default_rng(11)
    n_layer = spec.config["num_hidden_layers"]
    shape = (n_layer, spec.n_expert)
    resident = (rng.random(shape).argsort(-1) < spec.n_expert // 2).astype(int)
    buddies = rng.random((*shape, spec.n_expert)).argsort(-1)[..., :N_BUDDIES]
    buddies = np.where(buddies == np.arange(spec.n_expert)[:, None], -1, buddies)
    shares = -np.sort(-rng.random(buddies.shape), axis=-1).round(4)
    return {
        "resident": resident.tolist(), "buddies": buddies.tolist(), "shares": shares.tolist(),
        "tau": rng.uniform(0.3, 0.9, n_layer).round(3).tolist(),
    }  # fmt: skip


def scripted_parts(model: str, n_segments: int) -> list[Any]:
    """Which segments of each expert are there, the leading ones: [n_layer][n_expert][n_segments]."""
    spec, rng = tiny_models.MODELS[model], np.random.default_rng(13)
    n_there = rng.integers(0, n_segments + 1, (spec.config["num_hidden_layers"], spec.n_expert, 1))
    return (np.arange(n_segments) < n_there).astype(int).tolist()


def set_up(model: str) -> list[dict[str, Any]]:
    script = scripted(model)
    return [
        {"op": "loss_residency", "resident": script["resident"]},
        {"op": "buddies", "experts": script["buddies"], "shares": script["shares"], "tau": script["tau"]},
    ]


def in_transformers(models: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """What Transformers computes of families under rules, "model/rule"; see ``loss_child`` for an entry."""
    entries = []
    for model, entry in models.items():
        scoring, normalised = FAMILIES[model]
        spec = asdict(tiny_models.MODELS[model])
        entries.append(
            {"name": model, "spec": spec, "scoring": scoring, "normalised": normalised, **scripted(model)}
            | entry
        )
    return arrays_of("loss_child", entries)


def text_of(model: str) -> list[int]:
    """What Transformers computes."""
    return tiny_models.reference(model)["tokens"].tolist()


def under(rules: dict[str, Any] | None, text: list[int], save: str) -> list[dict[str, Any]]:
    """Ops that compute ``text`` token by token under rules, long after whatever was displaced before."""
    return [
        {"op": "loss", "rules": None, "lossy": False},
        {"op": "clear"}, {"op": "decode", "tokens": tokens(12, 5)}, {"op": "clear"},
        {"op": "loss", "rules": rules}, {"op": "reset_counters"},
        {"op": "steps", "tokens": text, "pos": 0, "save": save}, {"op": "loss_counters"},
    ]  # fmt: skip
