"""What measurements are made of: steps, matrices that stand for a model's, and samples made a rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mobile_gguf.memory.machine import read_memory
from mobile_gguf.sizes import MIB

from .ggml import Matrices
from .machine import Rate
from .workload import Product, Workload

PRODUCT_S = 0.3
WEIGHTS_BYTES = 96 * MIB  # beyond what caches hold, and little enough for a small machine
_MAX_STACKS = 400
_MAIN_PRODUCTS = 8  # shapes that make up most dense bytes


@dataclass(frozen=True)
class Step:
    """One measurement to make: what it is called, how long it takes, and how to say so."""

    name: str
    seconds: float
    phase: str
    run: Callable[[Callable[[], None]], dict[str, Rate]]


Known = Callable[[str], "Rate | None"]


def main_products(workload: Workload) -> tuple[Product, ...]:
    """The dense products worth measuring: those that make up most of the bytes."""
    ranked = sorted(workload.dense, key=lambda product: product.count * product.n_bytes, reverse=True)
    return tuple(ranked[:_MAIN_PRODUCTS])


def matrices(
    product: Product, n_expert: int, k: int, usual: bool, limit: int | None = None, *, n_tokens: int = 1
) -> Matrices:
    """What stands for a product of a model, in ``limit`` bytes of weights at most."""
    room = min(limit or WEIGHTS_BYTES, read_memory().available_bytes // 4)
    # a stack of fewer experts is as good, as long as they do not all stay in the cache
    n = max(k, min(n_expert, room // max(1, product.n_bytes)))
    # many tokens at once use a weight often, wherever it is
    stacks = 1 if n_tokens > 1 else max(1, min(_MAX_STACKS, int(room // max(1, product.n_bytes * n))))
    return Matrices(product.type_id, product.n_in, product.n_out, n, k, stacks, usual, n_tokens)


def mean_rate(times: Sequence[float]) -> Rate:
    """Seconds: the mean, because a token is a sum of many such, and a busy machine's pauses belong to it."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    mean = statistics.fmean(ordered)
    return Rate(mean, min(mean, ordered[quarter]), max(mean, ordered[-1 - quarter]))


def mean_speed(amount: float, times: Sequence[float]) -> Rate:
    """Bytes, or multiplications, per second."""
    seconds = mean_rate([max(1e-9, one) for one in times])
    return Rate(amount / seconds.value, amount / seconds.high, amount / seconds.low)
