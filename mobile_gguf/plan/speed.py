"""Time per token from bytes, bandwidths and misses: pure functions, in seconds and bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .misses import miss_distribution

# Of an expert's work, the part that needs nothing of its last matrix: gate and up of gate, up, down.
BEFORE_LAST = 2 / 3
# Of a layer with a miss: taking slots, waking readers, and being woken. Chosen to fit runs of the demo
# model, not measured by itself.
WAKE_S = 60e-6


@dataclass(frozen=True)
class Prediction:
    """Decoding speed foreseen for one model with given settings, in tokens per second; the actual one is
    expected in [low, high]."""

    mode: str
    predicted_tps: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Reads:
    """One expert's reads: how many, seconds of one alone, and of one among ``n_threads`` at once."""

    n_reads: float
    alone_s: float
    together_s: float
    n_threads: int

    def seconds(self, n_experts: float) -> float:
        """Until the reads of so many experts, asked for at once, are done."""
        if n_experts <= 0:
            return 0.0
        n_reads = n_experts * self.n_reads
        return max(self.alone_s, n_reads * self.together_s / self.n_threads)


@dataclass(frozen=True)
class Pass:
    """One pass over the model with ``k`` experts a layer, everything in memory.

    ``rest_s``: all but the experts; ``expert_s``: one layer's ``k`` experts.
    """

    k: int
    n_layer: int
    rest_s: float
    expert_s: float


def resident_seconds(one: Pass) -> float:
    """A pass that finds every expert in memory."""
    return one.rest_s + one.n_layer * one.expert_s


def pass_seconds(one: Pass, rate: float, reads: Reads) -> float:
    """A pass whose needs miss with probability ``rate``; hits are computed while misses arrive."""
    if rate <= 0 or one.k <= 0:
        return resident_seconds(one)
    layer = sum(
        probability * layer_seconds(one, n_misses, reads)
        for n_misses, probability in enumerate(miss_distribution(one.k, rate))
    )
    return one.rest_s + one.n_layer * layer


def layer_seconds(one: Pass, n_misses: float, reads: Reads) -> float:
    """The experts of one layer with so many misses, or as many parts of some.

    Gate and up of the hits overlap with the reads; the last matrix needs both, of all experts. However quick
    the reads are, all of it has to be computed.
    """
    if n_misses <= 0:
        return one.expert_s
    hits = 1 - n_misses / one.k
    early = one.expert_s * hits * BEFORE_LAST
    waiting = max(reads.seconds(n_misses), early) + one.expert_s * (1 - BEFORE_LAST)
    return WAKE_S + max(waiting, one.expert_s)


def mixed_seconds(little_s: float, big_s: float, again_s: float, big_share: float, *, by_head: bool) -> float:
    """Big-little: little tokens, and a share that is important.

    With a head these are run big at once; by confidence they are run little first and ``again_s`` is the
    second pass, which finds what the first has loaded.
    """
    if by_head:
        return (1 - big_share) * little_s + big_share * big_s
    return little_s + big_share * again_s


@dataclass(frozen=True)
class DeviceTier:
    """What a device does for a token: seconds of one layer's experts there, and of one expert's upload."""

    expert_s: float
    upload_s: float


def device_layer_seconds(device: DeviceTier, host: Pass, rate: float, miss: str) -> float:
    """One layer's experts with a share ``rate`` of needs not on the device.

    ``fetch``: uploaded, then computed there; ``cpu``: computed by the host while the device computes the
    hits; ``auto``: the split at which both sides end together, never worse than either.
    """
    misses = rate * host.k
    hot = device.expert_s * (1 - rate)
    cold = host.expert_s * rate
    fetch = misses * device.upload_s + device.expert_s
    cpu = max(hot, cold)
    if miss == "fetch":
        return fetch
    if miss == "cpu" or misses <= 0:
        return cpu
    per_expert_up = device.upload_s + device.expert_s / max(1, host.k)
    per_expert_cpu = host.expert_s / max(1, host.k)
    share = per_expert_cpu / max(1e-12, per_expert_up + per_expert_cpu)
    split = max(hot + share * misses * per_expert_up, (1 - share) * misses * per_expert_cpu)
    return min(fetch, cpu, split)
