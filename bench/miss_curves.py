"""The tables of ``mobile_gguf/plan/misses.py``, from recorded routing: what a budget misses.

    python -m mobile_gguf.bench.miss_curves qwen.route.csv.gz gemma.route.csv.gz

Models with fewer experts than a trace has are stood in for by the trace with its experts merged into groups
at random: a group is needed when one of its experts is. Misses are those of ``simulate``.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

from mobile_gguf.options.words import DEFAULT_EVICTION, EVICTION

from .simulate import POLICIES, Accesses, accesses, simulate
from .trace import Trace, read_trace

SHARES = (0.04, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 0.85)
EXPERTS = (8, 16, 32, 64, 128)
TOP_K = (1, 2, 3, 6)
WARM = 32  # decoded tokens after which the cache is taken to be in its steady state
ENGINE_POLICIES = tuple(sorted(EVICTION))


def merge_experts(asked: Accesses, n_groups: int, seed: int = 0) -> Accesses:
    """The same accesses with the experts of every layer merged into ``n_groups`` groups of equal size."""
    size = asked.n_expert // n_groups
    rng = np.random.default_rng(seed)
    group = np.stack([rng.permutation(asked.n_expert) // size for _ in range(asked.n_layer)])
    needs = [
        layer * n_groups + np.unique(group[layer][need - layer * asked.n_expert])
        for need, layer in zip(asked.needs, asked.layers, strict=True)
    ]
    return Accesses(needs, asked.steps, asked.layers, asked.counted, asked.n_layer, n_groups)


def miss_rates(trace: Trace, n_groups: int, k: int, policy: str) -> tuple[float, list[float], list[float]]:
    """Needs per layer and token; and for each share the steady misses per need, and the misses per layer that
    the first ``WARM`` tokens have beyond the steady rate, as a share of the layer's experts."""
    asked = merge_experts(accesses(trace, k, prompt_k=trace.k), n_groups)
    early = merge_experts(accesses(trace, k, prompt_k=trace.k, n_decode=WARM), n_groups)
    needs, early_needs = (_n_needs(part) for part in (asked, early))
    n_layer = early.n_counted / WARM
    steady, cold = [], []
    for share in SHARES:
        capacity = max(round(share * asked.n_layer * n_groups), max(map(len, asked.needs)))
        make = POLICIES[policy]
        misses = simulate(asked, capacity, make(asked.n_layer, n_groups))
        first = simulate(early, capacity, make(asked.n_layer, n_groups))
        rate = (misses - first) / (needs - early_needs)
        steady.append(rate)
        cold.append(max(0.0, (first - rate * early_needs) / n_layer / n_groups))
    return needs / asked.n_counted, steady, cold


def _n_needs(asked: Accesses) -> int:
    return sum(len(need) for need, counted in zip(asked.needs, asked.counted, strict=True) if counted)


def main(arguments: list[str]) -> int:
    """Print the tables for the traces named."""
    traces = [read_trace(Path(name)) for name in arguments]
    print(f"SHARES = {SHARES}")
    kept: dict[tuple[int, int], list[float]] = {}
    cold: list[list[float]] = []
    spread = []
    for n_groups in EXPERTS:
        for k in TOP_K:
            found = [miss_rates(trace, n_groups, k, DEFAULT_EVICTION) for trace in traces]
            needs = statistics.fmean(one[0] for one in found)
            rates = [statistics.fmean(column) for column in zip(*(one[1] for one in found), strict=True)]
            spread += [
                max(column) / max(min(column), 1e-9)
                for column in zip(*(one[1] for one in found), strict=True)
            ]
            cold += [one[2] for one in found]
            kept[n_groups, k] = rates
            print(
                f"    ({n_groups}, {needs:.2f}, ({', '.join(f'{rate:.3f}' for rate in rates)})),", flush=True
            )
    means = [statistics.fmean(column) for column in zip(*cold, strict=True)]
    print(f"COLD = ({', '.join(f'{value:.3f}' for value in means)})")
    print(f"spread between traces: median {statistics.median(spread):.3f}")
    for policy in ENGINE_POLICIES[1:]:
        factors = []
        for n_groups in (16, 128):
            for k in (3, 6):
                found = [miss_rates(trace, n_groups, k, policy)[1] for trace in traces]
                rates = [statistics.fmean(column) for column in zip(*found, strict=True)]
                factors.append([a / max(b, 1e-9) for a, b in zip(rates, kept[n_groups, k], strict=True)])
        means = [statistics.fmean(column) for column in zip(*factors, strict=True)]
        print(f"{policy}: ({', '.join(f'{value:.2f}' for value in means)})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
