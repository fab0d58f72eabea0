"""Tokens per second from a workload, measurements and settings: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.words import (
    AUTO_MODE,
    CACHE,
    EXACT,
    HOST,
    LAYERS,
    LITTLE,
    MODES,
)

from .disk import CHUNK_BYTES, read_size
from .machine import Measurements, Rate
from .measure import WHOLE, device_overhead_name, overhead_name, product_name, read_name
from .misses import MissRate, miss_rate
from .speed import (
    DeviceTier,
    Pass,
    Prediction,
    Reads,
    device_layer_seconds,
    mixed_seconds,
    pass_seconds,
    resident_seconds,
)
from .workload import Product, Settings, Workload

# Beside the engine: sampling from so many candidates, and a step of Python; on one EPYC core.
_SAMPLE_S, _STEP_S = 8e-9, 150e-6
# What the model itself gets wrong, as a share of the time; docs/plan.md has the table.
_MODEL_ERROR = 0.10
_GUESS_ERROR = 0.35  # where a matrix of this shape was not measured
_DEVICE_ERROR = 0.4  # on loopback; docs/plan.md
_DEPTH = 192  # tokens in the context, on average over an answer


class Unknown(Exception):
    """Something needed was never measured."""


def predict(
    info: GgufInfo,
    workload: Workload,
    measurements: Measurements,
    settings: Settings,
    disk: str,
    hotness: Sequence[Sequence[float]] | None = None,
) -> Prediction | None:
    """Decoding speed with ``settings``; None if too little was measured. ``disk``: as ``disk_name`` says
    it."""
    try:
        middle = Case(info, workload, measurements, settings, disk, hotness, "value", 0).seconds()
        fast = Case(info, workload, measurements, settings, disk, hotness, "fast", -1).seconds()
        slow = Case(info, workload, measurements, settings, disk, hotness, "slow", +1).seconds()
    except Unknown:
        return None
    error = _MODEL_ERROR
    if not _all_measured(workload, measurements, settings, info):
        error += _GUESS_ERROR
    if settings.device:
        error += _DEVICE_ERROR
    low, high = 1 / max(slow, middle) / (1 + error), 1 / min(fast, middle) * (1 + error)
    return Prediction(settings.mode, 1 / middle, low, high)


def predict_prefill(
    info: GgufInfo, workload: Workload, measurements: Measurements, settings: Settings, disk: str
) -> float | None:
    """Seconds of reading that a prompt of a micro-batch takes at least: experts that memory does not hold.

    None where it holds all of them.
    """
    if settings.ram_share >= 1 or not workload.experts:
        return None
    try:
        case = Case(info, workload, measurements, settings, disk, None, "value", 0)
        return (1 - settings.ram_share) * case.all_reads_s()
    except Unknown:
        return None


@dataclass(frozen=True)
class Case:
    """One corner of the error band: ``which`` quartile of what was measured, ``sign`` of the misses'
    spread."""

    info: GgufInfo
    workload: Workload
    measurements: Measurements
    settings: Settings
    disk: str
    hotness: Sequence[Sequence[float]] | None
    which: str
    sign: int

    def seconds(self) -> float:
        """Per token."""
        s = self.settings
        # before an answer there is no saying how its misses will be shared between little and big
        big_rate, little_rate = self.rate(s.k), self.rate(s.little_k)
        if s.mode in (EXACT, AUTO_MODE) or not self.workload.experts:
            return self.run(s.k, big_rate * s.missed)
        little_s = self.run(s.little_k, little_rate)
        if s.mode == LITTLE:
            return little_s
        share = s.big_share[1 + self.sign]
        # a cache that little tokens fill serves big ones a little worse, and the other way round
        big_s = self.run(s.k, big_rate)
        again = self.run(s.k, max(0.0, big_rate - little_rate * s.little_k / max(1, s.k)))
        return mixed_seconds(little_s, big_s, again, share, by_head=s.by_head)

    def rate(self, k: int) -> float:
        found: MissRate = miss_rate(
            self.settings.ram_share,
            self.info.n_expert,
            k,
            policy=self.settings.eviction,
            n_tokens=self.settings.n_tokens,
            hotness=self.hotness if k == self.settings.k else None,
        )
        return min(1.0, found.rate * (1 + self.sign * found.spread))

    def run(self, k: int, rate: float) -> float:
        sampling = _STEP_S + _SAMPLE_S * self.info.n_vocab
        if self.settings.device:
            return sampling + self.device_seconds(k, rate)
        one = self.host_pass(k, resident=self.settings.ram_share >= 1)
        one = replace(one, rest_s=one.rest_s + sampling)
        if rate <= 0 or not self.workload.experts:
            return resident_seconds(one)
        return pass_seconds(one, rate, self.reads())

    def host_pass(self, k: int, *, resident: bool) -> Pass:
        threads = self.settings.threads
        rest = sum(
            product.count * product.n_bytes / self.cpu_rate(product, 1, 1, usual=True)
            for product in self.workload.dense
        )
        name = overhead_name(self.info.n_expert or 1, k or 1, threads)
        rest += self.spent(f"{name}.token", f"overhead.{threads}.", ".token", 0.0)
        rest += self.info.n_layer * self.spent(f"{name}.layer", f"overhead.{threads}.", ".layer", 40e-6)
        rest += self.kv_bytes() / self.any_rate(f"cpu.{threads}.usual.")
        return Pass(k, self.info.n_layer_moe, rest, self.expert_seconds(k, resident=resident))

    def kv_bytes(self) -> float:
        """Of what a context keeps that a token reads and writes."""
        return self.info.caches.read_bytes(min(_DEPTH, self.settings.n_ctx))

    def expert_seconds(self, k: int, *, resident: bool) -> float:
        """One layer's ``k`` experts on the processor."""
        n, pieces = self.info.n_expert * self.info.segments, k * self.info.segments
        return sum(
            product.count * pieces * product.n_bytes / self.cpu_rate(product, n, pieces, usual=resident)
            for product in self.workload.experts
        )

    def reads(self) -> Reads:
        """One expert's."""
        n_threads = self.settings.io_threads
        n_reads = alone = together = 0.0
        for product in self.workload.experts:
            n = product.count * self.info.segments * max(1.0, product.n_bytes / CHUNK_BYTES)
            size = read_size(product.n_bytes, aligned=product.aligned)
            n_reads += n
            alone += n * self.read_s(size, 1)
            together += n * self.read_s(size, n_threads)
        return Reads(n_reads, alone / n_reads, together / n_reads, n_threads)

    def all_reads_s(self) -> float:
        """Every expert of every layer, as many at once as there are threads to read."""
        reads = self.reads()
        n_all = self.info.n_expert * self.info.segments * self.info.n_layer_moe
        return n_all * reads.n_reads * reads.together_s / reads.n_threads

    def read_s(self, size: int, n_threads: int) -> float:
        exact = self.measurements.get(read_name(self.disk, size, n_threads))
        if exact is not None:
            return self.slowness(exact)
        # the nearest size; bytes take time, and so does a request
        nearest: list[tuple[float, float]] = []
        for name in self.measurements.entries:
            words = name.rsplit(".", 2)
            rate = self.measurements.get(name) if name.startswith(f"{self.disk}.read.") else None
            if rate is None or not words[1].isdigit() or not words[2].isdigit():
                continue
            other, threads = int(words[1]), int(words[2])
            if (threads == 1) == (n_threads == 1):
                scale = max(size / other, 0.5) * n_threads / threads
                nearest.append((abs(math.log(size / other)), self.slowness(rate) * scale))
        if not nearest:
            raise Unknown
        return min(nearest)[1]

    # devices

    def device_seconds(self, k: int, host_rate: float) -> float:
        """A token with dense weights on the device, experts in slots there, in RAM, and in the file."""
        s, prefix = self.settings, self.settings.device
        rest = sum(
            product.count * product.n_bytes / self.device_rate(product, 1, 1)
            for product in self.workload.dense
        )
        n, pieces = self.info.n_expert * self.info.segments, k * self.info.segments
        expert = sum(
            product.count * pieces * product.n_bytes / self.device_rate(product, n, pieces)
            for product in self.workload.experts
        )
        upload = self.workload.expert_bytes * self.info.segments / self.speed(f"{prefix}.upload")
        rest += self.kv_bytes() / self.any_rate(f"{prefix}.", contains=".1of1")
        host = self.host_pass(k, resident=False)
        misses = miss_rate(s.vram_share, self.info.n_expert, k, policy=s.eviction, n_tokens=s.n_tokens)
        rate = min(1.0, misses.rate * (1 + self.sign * misses.spread))
        tier = DeviceTier(expert, upload)
        cached = device_layer_seconds(tier, host, rate, s.miss)
        if host_rate > 0 and rate > 0:
            # what the device holds the host need not: its misses are those of both tiers together
            both = self.rate_at(min(1.0, s.ram_share + s.vram_share), k)
            cached += self.reads().seconds(both * k)
        left = 1 - min(1.0, s.vram_share)  # of the layers
        on_host = host.expert_s
        if host_rate > 0 and left > 0:
            on_host += self.reads().seconds(host_rate * k)
        layered = (1 - left) * expert + left * on_host
        n_layer = self.info.n_layer_moe
        by_placement = {
            CACHE: self.beside(CACHE, k, rate > 0) + n_layer * cached,
            LAYERS: self.beside_layers(k, left) + n_layer * layered,
            HOST: self.beside_layers(k, 1.0) + n_layer * on_host,
        }
        if s.placement in by_placement:
            return rest + by_placement[s.placement]
        return rest + (by_placement[LAYERS] if left <= 0 else min(by_placement.values()))

    def beside_layers(self, k: int, left: float) -> float:
        """What whole layers cost beside their weights, with a share ``left`` of them on the host."""
        whole = self.beside(WHOLE, k, False)
        # measured with half of the layers: what is between none and all of them left is on a line
        return whole + 2 * left * max(0.0, self.beside(LAYERS, k, True) - whole)

    def beside(self, way: str, k: int, is_split: bool) -> float:
        """What scheduler and link cost a token beside the weights: as measured by a model of next to none, or
        else guessed from the latency."""
        prefix = self.settings.device
        name = device_overhead_name(prefix, way, self.info.n_expert or 1, k or 1, self.settings.threads)
        token = self.measurements.get(f"{name}.token")
        layer = self.measurements.get(f"{name}.layer")
        if token is not None and layer is not None:
            return self.slowness(token) + self.info.n_layer_moe * self.slowness(layer)
        launch = self.spent(f"{prefix}.launch", prefix, ".launch", 50e-6)
        crossing = sum(
            self.spent(f"{prefix}.{way}.latency", prefix, ".latency", 50e-6) for way in ("upload", "download")
        )
        return launch + (self.info.n_layer_moe * (2 * launch + crossing) if is_split else 0.0)

    def rate_at(self, share: float, k: int) -> float:
        found = miss_rate(
            share, self.info.n_expert, k, policy=self.settings.eviction, n_tokens=self.settings.n_tokens
        )
        return min(1.0, found.rate * (1 + self.sign * found.spread))

    def device_rate(self, product: Product, n_expert: int, k: int) -> float:
        prefix = self.settings.device
        name = f"{prefix}.{product.type_id}.{product.n_in}x{product.n_out}.{k}of{n_expert}"
        exact = self.measurements.get(name)
        if exact is not None:
            return self.quickness(exact)
        return self.any_rate(f"{prefix}.{product.type_id}.", f"{prefix}.", contains="x")

    # measurements

    def cpu_rate(self, product: Product, n_expert: int, k: int, *, usual: bool) -> float:
        threads = self.settings.threads
        exact = self.measurements.get(product_name(product, threads, n_expert=n_expert, k=k, usual=usual))
        if exact is not None:
            return self.quickness(exact)
        where = "usual" if usual else "plain"
        prefix = f"cpu.{threads}."
        return self.any_rate(f"{prefix}{where}.{product.type_id}.", f"{prefix}{where}.", prefix)

    def any_rate(self, *prefixes: str, contains: str = "") -> float:
        """The median of what was measured under the first prefix that has anything."""
        for prefix in prefixes:
            found = self.matching(lambda name, prefix=prefix: name.startswith(prefix) and contains in name)
            if found:
                return statistics.median(map(self.quickness, found))
        raise Unknown

    def matching(self, wanted: Callable[[str], bool]) -> list[Rate]:
        found = (self.measurements.get(name) for name in self.measurements.entries if wanted(name))
        return [rate for rate in found if rate is not None]

    def speed(self, name: str) -> float:
        rate = self.measurements.get(name)
        if rate is None:
            raise Unknown
        return self.quickness(rate)

    def spent(self, name: str, prefix: str, suffix: str, default: float) -> float:
        """Seconds by name, or the median of what is called alike."""
        exact = self.measurements.get(name)
        if exact is not None:
            return self.slowness(exact)
        alike = self.matching(lambda other: other.startswith(prefix) and other.endswith(suffix))
        return statistics.median(map(self.slowness, alike)) if alike else default

    def quickness(self, rate: Rate) -> float:
        """Of bytes per second: the upper quartile is the fast case."""
        return max(1.0, {"value": rate.value, "fast": rate.high, "slow": rate.low}[self.which])

    def slowness(self, rate: Rate) -> float:
        """Of seconds: the upper quartile is the slow case."""
        return {"value": rate.value, "fast": rate.low, "slow": rate.high}[self.which]


def _all_measured(workload: Workload, measurements: Measurements, settings: Settings, info: GgufInfo) -> bool:
    n = info.n_expert * info.segments
    k = (settings.little_k if settings.mode == LITTLE else settings.k) * info.segments
    if settings.device:
        return True
    usual = settings.ram_share >= 1
    return all(
        measurements.get(product_name(product, settings.threads, n_expert=n, k=k, usual=usual)) is not None
        for product in workload.experts
    ) and (settings.mode in MODES)
