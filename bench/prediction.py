"""How well the next layer's experts can be told from this one, and what reading them ahead would win.

    python -m mobile_gguf.bench.prediction qwen.route.csv.gz gemma.route.csv.gz

A trace has ids only: the predictor is the engine's (mobile-predict.cpp), P(expert | experts of the layer
before) counted on the tokens so far. Reads ahead are instantaneous and the cache's policy is ``decay``, so
that misses avoided are a bound and reads wasted a fair count.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .simulate import Accesses, Decay, accesses
from .trace import Trace, read_trace

PRIOR_TOKENS, PRIOR_COMMON = 2.0, 0.5  # as in mobile-predict.cpp
WARM_UP = 32  # tokens after the prompt whose predictions are not judged

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Per token and layer: misses, reads ahead, and of these used and wasted."""

    misses: float
    queued: float
    used: float
    wasted: float


def transition_scores(trace: Trace, k: int) -> Floats:
    """Scores [n_steps, n_layer, n_expert] for the next layer's ``k`` best, from what went before only."""
    n_steps, n_layer, n_expert = trace.n_steps, trace.n_layer, trace.n_expert
    scores = np.zeros((n_steps, n_layer, n_expert))
    following = np.zeros((n_layer, n_expert, n_expert))
    uses = np.zeros((n_layer, n_expert))
    for step in range(n_steps):
        routed = [ids[ids >= 0] for ids in trace.experts[step, :, :k]]
        for layer in range(1, n_layer):
            before = routed[layer - 1]
            if len(before):
                share = (uses[layer] + 0.05) / (step + 1)
                counted = following[layer, before] + PRIOR_TOKENS * share
                chance = counted / (uses[layer - 1, before] + PRIOR_TOKENS)[:, None]
                common = PRIOR_COMMON * (len(before) - 1) * np.log(share)
                scores[step, layer] = np.log(chance).sum(0) - common
        for layer, ids in enumerate(routed):
            if layer:
                following[layer, routed[layer - 1][:, None], ids] += 1
            uses[layer, ids] += 1
    return scores


def precision(trace: Trace, scores: Floats, k: int, n: int) -> float:
    """Share of the ``n`` best-scored experts that are among the ``k`` routed to."""
    start = trace.n_prompt + WARM_UP
    best = np.argsort(-scores[start:, 1:], axis=-1, kind="stable")[..., :n]
    return float((best[..., :, None] == trace.experts[start:, 1:, None, :k]).any(-1).mean())


def simulate_ahead(asked: Accesses, capacity: int, scores: Floats | None, n: int) -> Outcome:
    """Decoding with the ``n`` best-scored experts of the next layer read ahead; None: nothing is."""
    n_expert = asked.n_expert
    policy = Decay(asked.n_layer, n_expert)
    resident = np.zeros(asked.n_layer * n_expert, dtype=bool)
    unused = resident.copy()
    last = np.full(len(resident), -1)
    misses = queued = used = wasted = 0

    def make_room(n_more: int, kept: npt.NDArray[np.int64], step: int, layer: int) -> int:
        excess = int(resident.sum()) + n_more - capacity
        if excess <= 0:
            return 0
        candidates = np.setdiff1d(np.flatnonzero(resident), kept)
        order = np.argsort(policy.score(candidates, step, layer), kind="stable")
        gone = candidates[order[:excess]]
        n_wasted = int(unused[gone].sum())
        resident[gone] = unused[gone] = False
        return n_wasted

    for need, step, layer, counted in zip(asked.needs, asked.steps, asked.layers, asked.counted, strict=True):
        missing = need[~resident[need]]
        misses += len(missing) * counted
        used += int(unused[need].sum())
        unused[need] = False
        wasted += make_room(len(missing), need, step, layer)
        resident[missing] = True
        policy.touch(need, step, layer)
        last[need] = step
        if scores is None or not counted or layer + 1 == asked.n_layer:
            continue
        best = np.argsort(-scores[step, layer + 1], kind="stable")[:n] + (layer + 1) * n_expert
        ahead = best[~resident[best]]
        kept = np.concatenate([need, np.flatnonzero(last == step)])
        wasted += make_room(len(ahead), kept, step, layer)
        resident[ahead] = unused[ahead] = True
        policy.last[ahead] = np.maximum(policy.last[ahead], step - 1)
        policy.mu[ahead] = np.maximum(policy.mu[ahead], 1)
        queued += len(ahead)
    total = asked.n_counted
    return Outcome(misses / total, queued / total, used / total, wasted / total)


def oracle_scores(trace: Trace, k: int) -> Floats:
    """Scores of a predictor that is always right."""
    scores = np.zeros((trace.n_steps, trace.n_layer, trace.n_expert))
    ids = np.maximum(trace.experts[:, :, :k], 0)
    np.put_along_axis(scores, ids, np.broadcast_to(np.arange(k, 0, -1.0), ids.shape), axis=-1)
    return scores


def format_trace(trace: Trace) -> str:
    """A Markdown table of predictions and what they win at 12.5% and 25%."""
    lines = [
        f"| {trace.source} | k | predictor | read ahead | precision | misses | reads | used | wasted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for share in (0.125, 0.25):
        for k in (trace.k, trace.k // 2):
            asked = accesses(trace, k)
            capacity = int(share * trace.n_layer * trace.n_expert)
            predictors = {"transitions": transition_scores(trace, k), "always right": oracle_scores(trace, k)}
            plain = simulate_ahead(asked, capacity, None, 0)
            lines.append(
                f"| {share:.1%} | {k} | none | 0 | - | {plain.misses:.2f} | {plain.misses:.2f} | - | - |"
            )
            for name, scores in predictors.items():
                for n in (k, max(1, k // 2)):
                    result = simulate_ahead(asked, capacity, scores, n)
                    lines.append(
                        f"| {share:.1%} | {k} | {name} | {n} | {precision(trace, scores, k, n):.0%} "
                        f"| {result.misses:.2f} | {result.misses + result.queued:.2f} "
                        f"| {result.used:.2f} | {result.wasted:.2f} |"
                    )
    return "\n".join(lines)


def main() -> int:
    """Print the tables of the traces on the command line."""
    for path in sys.argv[1:]:
        sys.stdout.write(format_trace(read_trace(Path(path))) + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
