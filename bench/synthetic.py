"""A made-up routing trace with the locality of a real one, for when there is none at hand.

The model is a router per layer, independent of the other layers. An expert's score for a token is

    log popularity + x(token) + NOISE * Gumbel noise,

and the top-k by score are used, best first. Popularity is Zipf's law with an exponential cut-off, in a random
order (within one text a layer keeps to some fifty of its 128 experts); x is first-order Markov, a Gaussian
process of unit variance and correlation MEMORY from one token to the next. The constants are fitted to the
Qwen3-30B-A3B trace of DESIGN.md section 2: the misses of LRU and MIN at 12.5% and 25%, for K and K/2, come
out within about 15% of its. Real traces differ, so results say which was used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .trace import Trace, read_trace

ZIPF_EXPONENT = 0.4
POPULARITY_CUTOFF = 18 / 128  # of the experts
MEMORY = 0.6
NOISE = 0.9


def synthesise_trace(
    n_layer: int = 48, n_expert: int = 128, k: int = 6, n_prompt: int = 28, n_decode: int = 128, seed: int = 1
) -> Trace:
    """A trace of the given geometry; the same arguments give the same trace."""
    rng = np.random.default_rng(seed)
    position = np.arange(n_expert)
    popularity = -ZIPF_EXPONENT * np.log(position + 1) - position / (POPULARITY_CUTOFF * n_expert)
    base = np.stack([popularity[rng.permutation(n_expert)] for _ in range(n_layer)])
    drift = rng.standard_normal(base.shape)
    n_steps = n_prompt + n_decode
    experts = np.empty((n_steps, n_layer, k), dtype=np.int32)
    weights = np.empty((n_steps, n_layer, k), dtype=np.float32)
    for step in range(n_steps):
        if step:
            drift = MEMORY * drift + (1 - MEMORY**2) ** 0.5 * rng.standard_normal(base.shape)
        scores = base + drift + NOISE * rng.gumbel(size=base.shape)
        experts[step] = np.argsort(-scores, axis=1)[:, :k]
        best = np.take_along_axis(scores, experts[step].astype(np.int64), axis=1)
        share = np.exp(best - best[:, :1])
        weights[step] = share / share.sum(axis=1, keepdims=True)
    return Trace("synthetic", experts, weights, n_expert, n_prompt, "synthetic (Zipf and Markov)")


def trace_at(path: Path | None) -> Trace:
    """The trace of a file, a made-up one without a file."""
    return read_trace(path) if path is not None else synthesise_trace()
