"""The ladder of lossy rules once more, by the words of docs/loss.md, to hold the engine's against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DEFAULTS: dict[str, Any] = {
    "drop": 0.0, "little_on_miss": 0, "again_tokens": 8, "substitute": 0, "keep": 2, "substitutes_max": 3,
    "tau": 0.95, "beta": 0.6, "eta": 0.0, "margin": 0.25, "prior": 0.15, "admit": 1,
    "prompt_drop": 0.0, "partial": 0.0,
}  # fmt: skip
OFF, BUDDY, LIVE, PRIOR, RANDOM = range(5)  # enum mobile_substitute
NEVER = -1e15

Mass = Callable[[np.ndarray], np.ndarray]


@dataclass
class Layer:
    """A layer's state: ``seen[e]`` is when expert e was displaced last.

    ``there[e]`` is the share of its segments that are, where experts may run in part; ``in_part`` are the
    slots of the last token that do.
    """

    resident: np.ndarray
    rules: dict[str, Any]
    buddies: np.ndarray | None = None  # [n_expert, n]
    shares: np.ndarray | None = None
    tau: float = 1.0
    logit: Mass = np.log  # the router's logits of its probabilities
    mass: Mass = np.asarray  # what weights are proportional to
    seen: dict[int, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    there: np.ndarray | None = None
    in_part: set[int] = field(default_factory=set)

    def count(self, name: str, by: float = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + by


def missing_share(tokens: list[np.ndarray], resident: np.ndarray) -> float:
    """Of the distinct experts that a layer's tokens ask for."""
    asked = {int(e) for ids in tokens for e in ids if e >= 0}
    return sum(not resident[e] for e in asked) / max(1, len(asked))


def apply(
    layer: Layer,
    ids: np.ndarray,
    weights: np.ndarray,
    *,
    probs: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    time: float = 0.0,
    share_missing: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (-1: not computed) and weights of a token's slots by the rules, not renormalised."""
    rules = DEFAULTS | layer.rules
    k = len(ids)
    ids, weights = ids.copy(), weights.astype(np.float64)
    part = weights / weights.sum()
    by_weight = sorted(range(k), key=lambda i: (-weights[i], i))
    light = [s for s in reversed(by_weight[rules["keep"] :]) if ids[s] >= 0]  # may be touched, lightest first
    layer.in_part = set()
    layer.count("n_layers")
    layer.count("n_missing", sum(e >= 0 and not layer.resident[e] for e in ids))

    def again(expert: int) -> bool:
        return 0 < time - layer.seen.get(expert, NEVER) <= rules["again_tokens"]

    def displace(slot: int, other: int, what: str) -> None:
        layer.seen[int(ids[slot])] = time
        ids[slot] = other
        layer.count(what)
        layer.count("moved_weight", part[slot])

    if rules["substitute"] == PRIOR and rules["prior"] > 0:
        assert probs is not None
        assert scores is not None
        heaviest = by_weight[0]
        unit = weights[heaviest] / layer.mass(probs)[ids[heaviest]]
        z = scores.astype(np.float64) if scores is not probs else layer.logit(probs.astype(np.float64))
        fine = np.isfinite(z)
        z = np.where(layer.resident & fine, z + rules["prior"] * np.ptp(z[fine]), z)
        kept = {int(e) for s, e in enumerate(ids) if s not in light}
        own = {int(ids[s]) for s in light}
        ranked = sorted(
            (e for e in np.flatnonzero(fine) if e not in kept), key=lambda e: (-z[e], e not in own)
        )
        chosen = [int(e) for e in ranked[: len(light)]]
        fresh = [e for e in chosen if e not in own]
        for slot in light:
            if int(ids[slot]) not in chosen and fresh:
                other = fresh.pop(0)
                displace(slot, other, "n_substituted")
                weights[slot] = unit * layer.mass(probs)[other]

    tau = layer.tau if rules["tau"] < 0 else rules["tau"]
    entropy = -sum(p * math.log(p) for p in part if p > 0) / math.log(k) if k > 1 else 0.0
    gates = entropy > tau and share_missing < rules["beta"]
    n = 0
    for slot in light:
        expert = int(ids[slot])
        if layer.resident[expert]:
            continue
        if layer.there is not None and 0 < rules["partial"] <= layer.there[expert]:
            layer.seen[expert] = time
            layer.in_part.add(slot)
            layer.count("n_partial")
            layer.count("moved_weight", part[slot] * (1 - layer.there[expert]))
            continue
        if part[slot] < rules["drop"] / k:
            displace(slot, -1, "n_dropped")
            continue
        if rules["little_on_miss"] and by_weight.index(slot) >= rules["little_on_miss"]:
            if again(expert):
                layer.count("n_again")
            else:
                displace(slot, -1, "n_left_out")
            continue
        if n == rules["substitutes_max"]:
            continue
        other = None
        free = [e for e in np.flatnonzero(layer.resident) if e not in ids]
        if rules["substitute"] == BUDDY and gates:
            assert layer.buddies is not None
            assert layer.shares is not None
            z = np.zeros(len(layer.resident))
            if rules["eta"]:
                assert probs is not None
                z = layer.logit(probs.astype(np.float64))
                z = (z - z.mean()) / z.std()
            listed = zip(layer.buddies[expert], layer.shares[expert], strict=True)
            psi = {int(b): q * (1 + rules["eta"] * z[b]) for b, q in listed if b in free}
            other = max(psi, key=psi.__getitem__, default=None)
        elif rules["substitute"] == LIVE and rules["margin"] > 0:
            assert probs is not None
            assert scores is not None
            free = [e for e in free if np.isfinite(scores[e])]
            best = max(free, key=lambda e: scores[e], default=None)
            mass = layer.mass(probs.astype(np.float64))
            if best is not None:
                short = mass[expert] - mass[best] if scores is probs else float(scores[expert]) - scores[best]
                other = int(best) if short <= rules["margin"] * mass[expert] else None
        if other is not None:
            displace(slot, other, "n_substituted")
            n += 1
    return ids, weights


def apply_together(
    rules: dict[str, Any], resident: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, float]:
    """Ids [n_tokens, k] of tokens that are computed together, by prompt_drop, and the weight it moved."""
    rules = DEFAULTS | rules
    asked = ids >= 0
    heaviest = np.argsort(-weights, axis=-1, kind="stable")[:, : rules["keep"]]
    kept = {int(e) for row, slots in zip(ids, heaviest, strict=True) for e in row[slots]}
    total = weights[asked].sum(dtype=np.float64)
    out, moved = ids.copy(), 0.0
    for expert in {int(e) for e in ids[asked]} - kept:
        here = ids == expert
        if len(ids) > 1 and not resident[expert] and weights[here].sum() < rules["prompt_drop"] * total:
            out[here] = -1
            moved += float((weights / weights.sum(-1, keepdims=True))[here].sum())
    return out, moved
