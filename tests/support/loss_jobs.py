"""Lossy rules for jobs of ``engine_child``, and a script of what is resident."""

from __future__ import annotations

from typing import Any

import loss_oracle as oracle
import numpy as np
import tiny_models

N_BUDDIES = 6
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


def set_up(model: str) -> list[dict[str, Any]]:
    script = scripted(model)
    return [
        {"op": "loss_residency", "resident": script["resident"]},
        {"op": "buddies", "experts": script["buddies"], "shares": script["shares"], "tau": script["tau"]},
    ]
