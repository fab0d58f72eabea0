"""Measuring what a plan for one model needs to know about the machine, in at most a minute.

What was measured before is not measured again. Nothing large is written; about 100 MiB of memory is used for
a moment. Ctrl-C ends it between two samples; what was measured until then is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from mobile_gguf.engine.devices import CPU, Device, all_devices
from mobile_gguf.engine.log import capture_log
from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.words import CACHE, DEFAULT_IO_THREADS, LAYERS
from mobile_gguf.progress import Progress, no_progress
from mobile_gguf.sizes import MIB

from .disk import disk_name, measure_reads, read_size
from .ggml import F32, Ggml, Matrices, device_key
from .machine import Measurements, Rate, write_measurements
from .measure_prompts import prompt_steps
from .steps import PRODUCT_S, WEIGHTS_BYTES, Known, Step, main_products, matrices, mean_rate, mean_speed
from .tiny import OnDevice, measure_overhead, overhead
from .workload import Product, Workload

LIMIT_S = 60.0
_DISK_S, _OVERHEAD_S, _LINK_S = 0.6, 0.5, 0.4
_MIN_DEVICE_BYTES, _SEND_S = 4 * MIB, 0.5  # they have to be sent there first
_SMALL_COPY, _LARGE_COPY = 4096, 4 * MIB
WHOLE = "whole"
_WAYS = {CACHE: (CACHE, 0.5), LAYERS: (LAYERS, 0.5), WHOLE: (LAYERS, 1.0)}  # placement, share of slots


def product_name(
    product: Product, threads: int, *, n_expert: int = 1, k: int = 1, usual: bool = False
) -> str:
    """What the bytes per second of a product on the CPU are called."""
    where = "usual" if usual else "plain"
    return f"cpu.{threads}.{where}.{product.type_id}.{product.n_in}x{product.n_out}.{k}of{n_expert}"


def read_name(disk: str, n_bytes: int, n_threads: int) -> str:
    """What the seconds per read are called."""
    return f"{disk}.read.{n_bytes}.{n_threads}"


def overhead_name(n_expert: int, k: int, threads: int) -> str:
    """What the seconds per token and per layer beside all bytes are called (``.token``, ``.layer``)."""
    return f"overhead.{threads}.{k}of{n_expert}"


def steps_for(
    info: GgufInfo,
    workload: Workload,
    ks: Sequence[int],
    threads: int,
    io_threads: int = DEFAULT_IO_THREADS,
    *,
    threads_batch: int | None = None,
    flash_attn: bool = False,
    resident: bool = True,
    stored: bool = True,
    devices: Sequence[Device] = (),
    ggml: Ggml | None = None,
    known: Known = lambda name: None,
) -> list[Step]:
    """Every measurement that a plan for this model takes; ``ks`` are the experts a token may use.

    ``resident``: as the experts are multiplied when all of them stay in memory; ``stored``: as when not, and
    the disk. ``threads_batch`` multiply prompts, as many as ``threads`` unless said. ``known``: what was
    measured, also by steps before; a device's link decides how much is sent.
    """
    ggml = ggml or Ggml()
    cpu = next(iter(all_devices([CPU])), None)
    if cpu is None:
        raise EngineError("cannot measure: the engine has no CPU device")
    found: list[Step] = []

    def add_product(product: Product, n_expert: int, k: int, usual: bool) -> None:
        name = product_name(product, threads, n_expert=n_expert, k=k, usual=usual)
        what = matrices(product, n_expert, k, usual)
        phase = "measuring the processor"
        found.append(
            Step(name, PRODUCT_S, phase, lambda check: _product(ggml, cpu, threads, name, what, check))
        )

    n_expert, segments = info.n_expert, info.segments
    for product in workload.experts:
        for k in ks:
            for usual in [False] * stored + [True] * resident:
                add_product(product, n_expert * segments, k * segments, usual)
    for product in main_products(workload):
        add_product(product, 1, 1, True)
    for k in ks:
        name = overhead_name(n_expert, k, threads)

        def overheads(check: Callable[[], None], name: str = name, k: int = k) -> dict[str, Rate]:
            return _overhead(name, n_expert, k, threads, check)

        found.append(Step(f"{name}.layer", _OVERHEAD_S + 0.3, "measuring the engine", overheads))
    disk = disk_name(info.path)
    for product in workload.experts if stored else ():
        n_bytes = read_size(product.n_bytes, aligned=product.aligned)
        for n_threads in sorted({1, io_threads}):
            name = read_name(disk, n_bytes, n_threads)

            def reads(
                check: Callable[[], None], name: str = name, n: int = n_bytes, threads: int = n_threads
            ):
                return {name: measure_reads(info.path, n, threads, _DISK_S, check)}

            found.append(Step(name, _DISK_S, "measuring the disk", reads))
    found += prompt_steps(
        info, workload, threads_batch or threads,
        flash_attn=flash_attn, resident=resident, stored=stored, cpu=cpu, ggml=ggml,
    )  # fmt: skip
    for device in devices:
        found += _device_steps(ggml, device, workload, n_expert * segments, [k * segments for k in ks], known)
        found += _device_overhead_steps(device, n_expert, ks, threads)
    return list({step.name: step for step in found}.values())


def _device_steps(
    ggml: Ggml, device: Device, workload: Workload, n_expert: int, ks: Sequence[int], known: Known
) -> Iterator[Step]:
    prefix = device_key(device.name, device.description)

    def link(check: Callable[[], None]) -> dict[str, Rate]:
        return _link(ggml, device, prefix, check)

    def launch(check: Callable[[], None]) -> dict[str, Rate]:
        with ggml.backend(device) as backend:
            _, times = ggml.time_products(device, backend, Matrices(F32, 32, 32), PRODUCT_S, check)
        return {f"{prefix}.launch": mean_rate(times)}

    yield Step(f"{prefix}.launch", PRODUCT_S, f"measuring {device.name}", launch)
    yield Step(f"{prefix}.upload", 2 * _LINK_S, f"measuring {device.name}", link)
    wanted = [(product, 1, 1) for product in main_products(workload)]
    wanted += [(product, n_expert, k) for product in workload.experts for k in ks]
    for product, n, k in wanted:
        name = f"{prefix}.{product.type_id}.{product.n_in}x{product.n_out}.{k}of{n}"

        def products(
            check: Callable[[], None], name: str = name, product: Product = product, n: int = n, k: int = k
        ) -> dict[str, Rate]:
            link = known(f"{prefix}.upload")
            room = max(_MIN_DEVICE_BYTES, int(_SEND_S * link.value)) if link else _MIN_DEVICE_BYTES
            what = matrices(product, n, k, False, min(room, WEIGHTS_BYTES))
            return _product(ggml, device, 0, name, what, check)

        yield Step(name, PRODUCT_S + _SEND_S, f"measuring {device.name}", products)


def _device_overhead_steps(device: Device, n_expert: int, ks: Sequence[int], threads: int) -> Iterator[Step]:
    """What a layer costs beside its bytes on the way that a run takes."""
    if n_expert < 2:
        return
    key = device_key(device.name, device.description)
    for way, (placement, share) in _WAYS.items():
        for k in ks:
            name = device_overhead_name(key, way, n_expert, k, threads)
            on_device = OnDevice(device, placement, share)

            def run(
                check: Callable[[], None], name: str = name, k: int = k, on_device: OnDevice = on_device
            ) -> dict[str, Rate]:
                few, many = measure_overhead(n_expert, k, threads, _OVERHEAD_S, check, on_device)
                return _overhead_rates(name, few, many)

            yield Step(f"{name}.layer", _OVERHEAD_S + 0.5, f"measuring {device.name}", run)


def device_overhead_name(prefix: str, way: str, n_expert: int, k: int, threads: int) -> str:
    """Of a token's and a layer's cost on a device, less ``.token`` and ``.layer``.

    ``way``: CACHE, LAYERS (half of the layers are there), or WHOLE (all are).
    """
    return f"{prefix}.{way}.{overhead_name(n_expert, k, threads)}"


def measure(
    measurements: Measurements,
    steps: Sequence[Step],
    progress: Progress = no_progress,
    limit_s: float = LIMIT_S,
) -> list[str]:
    """Make those of ``steps`` that ``measurements`` has not got, and keep them, whatever happens.

    Returns what was left out for want of time or because it failed, as sentences; also that the result cannot
    be kept.
    """
    capture_log()
    missing = [step for step in steps if measurements.get(step.name) is None]
    started = time.monotonic()
    total = sum(step.seconds for step in missing) or 1.0
    left_out: list[str] = []
    done = 0.0
    try:
        for step in missing:
            spent = time.monotonic() - started
            if spent + step.seconds > limit_s:
                left_out.append(f"{step.name} was not measured: the minute was over")
                continue
            progress(step.phase, done / total)

            def check(step: Step = step, begun: float = time.monotonic()) -> None:
                if time.monotonic() - begun > 5 * step.seconds + 2 or time.monotonic() - started > limit_s:
                    raise _TooSlow

            try:
                for name, rate in step.run(check).items():
                    measurements.put(name, rate)
            except _TooSlow:
                left_out.append(f"{step.name} was not measured: it took too long")
            except MobileError as error:
                left_out.append(f"{step.name} was not measured: {error}")
            done += step.seconds
    finally:
        if missing:
            try:
                write_measurements(measurements)
            except MobileError as error:
                left_out.append(f"the measurements are not kept: {error}")
    return left_out


class _TooSlow(Exception):
    """A step takes much longer than it should."""


def expected_seconds(measurements: Measurements, steps: Sequence[Step]) -> float:
    """How long ``measure`` will take, about."""
    return min(LIMIT_S, sum(1.3 * step.seconds for step in steps if measurements.get(step.name) is None))


def _product(
    ggml: Ggml, device: Device, threads: int, name: str, what: Matrices, check: Callable[[], None]
) -> dict[str, Rate]:
    with ggml.backend(device, threads) as backend:
        n_bytes, times = ggml.time_products(device, backend, what, PRODUCT_S, check)
    return {name: mean_speed(n_bytes, times)}


def _overhead(name: str, n_expert: int, k: int, threads: int, check: Callable[[], None]) -> dict[str, Rate]:
    few, many = measure_overhead(n_expert, k, threads, _OVERHEAD_S, check)
    return _overhead_rates(name, few, many)


def _overhead_rates(name: str, few: Sequence[float], many: Sequence[float]) -> dict[str, Rate]:
    few_rate, many_rate = mean_rate(few), mean_rate(many)
    token, layer = overhead(few_rate.value, many_rate.value)
    _, low = overhead(few_rate.value, many_rate.low)
    _, high = overhead(few_rate.value, many_rate.high)
    return {
        f"{name}.token": Rate(token, token, token),
        f"{name}.layer": Rate(layer, min(low, layer), max(high, layer)),
    }


def _link(ggml: Ggml, device: Device, prefix: str, check: Callable[[], None]) -> dict[str, Rate]:
    with ggml.backend(device) as backend:
        small_up, small_down = ggml.time_copies(device, backend, _SMALL_COPY, _LINK_S, check)
        large_up, large_down = ggml.time_copies(device, backend, _LARGE_COPY, _LINK_S, check)
    found = {}
    for what, small, large in (("upload", small_up, large_up), ("download", small_down, large_down)):
        latency = mean_rate(small)
        found[f"{prefix}.{what}.latency"] = latency
        extra = [max(1e-9, seconds - latency.value) for seconds in large]
        found[f"{prefix}.{what}"] = mean_speed(_LARGE_COPY - _SMALL_COPY, extra)
    return found
