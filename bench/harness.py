"""The whole benchmark: trace, model, sweep, interleaved rounds of all arms, report."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobile_gguf.engine.binding import find_engine, needs_engine
from mobile_gguf.errors import EngineError, MobileError, UsageError
from mobile_gguf.memory.cap import CgroupError, create_memory_cgroup
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.sizes import GIB, format_bytes

from .arm import Arm, ArmRun, Runner, text_of
from .build import ensure_model, model_path
from .disk import drop_page_cache, measure_bandwidth
from .geometry import ModelShape, scale_model
from .hardware import describe_hardware, n_cpus
from .other import OtherCommand
from .plan import BenchOptions, plan_arms
from .report import Report, describe_model, doubts, how_measured, make_rows
from .routing import check_routing
from .sweep import SweepChoices, default_threads, stock_load_modes, sweep
from .synthetic import trace_at
from .trace import Trace

Narrate = Callable[[str], None]

SWEEP_LIMIT_S = 45.0


def run_benchmark(options: BenchOptions, narrate: Narrate) -> Report:
    """Build what is missing, run every arm, and report. Raises MobileError for what stops all of it."""
    trace = trace_at(options.trace)
    if options.tokens > trace.n_decode:
        raise UsageError(f"--tokens {options.tokens}: the trace {trace.source} has {trace.n_decode}")
    shape = scale_model(trace, options.size_bytes)
    arms, notes = plan_arms(options, shape, available_bytes=read_memory().available_bytes)
    libraries = find_libraries(options, {arm.system for arm in arms})
    runner = _prepare(trace, shape, libraries, narrate)
    try:
        create_memory_cgroup(GIB, "mobile-gguf-bench").remove()
        capped = True
    except CgroupError as error:
        capped = False
        notes.insert(0, f"UNCAPPED: {error}")
        narrate(notes[0])
    report = Report(
        command=shlex.join(["mobile-gguf", *sys.argv[1:]]),
        hardware=describe_hardware(runner.model),
        trace={
            "source": trace.source, "n_layer": trace.n_layer, "n_expert": trace.n_expert, "k": trace.k,
            "n_prompt": trace.n_prompt, "n_decode": options.tokens,
        },
        model={**asdict(shape), "expert_bytes": shape.expert_bytes, "summary": describe_model(shape)},
        capped=capped,
        options={name: _for_json(value) for name, value in asdict(options).items()},
        notes=notes,
    )  # fmt: skip
    report.notes += [f"{command.name}: `{command.text}`" for command in options.others]
    if options.trace is None:
        report.notes.append(
            "no --trace was given: the routing is made up (bench/synthetic.py says how), with about the "
            "locality of a real one; expect other misses from a real trace"
        )
    arms = _sweep_all(arms, options, runner, shape, report, narrate)
    _run_rounds(arms, options, runner, shape, report, narrate)
    report.rows = make_rows(arms, report.runs, trace, shape, runner.little_k, options.tokens)
    report.notes.extend(doubts(report, shape.file_bytes, os.cpu_count() or 1))
    report.notes.append(how_measured(options, report))
    return report


def find_libraries(options: BenchOptions, systems: set[str]) -> dict[str, Path | None]:
    """Library directories of the systems that take part; None is the installed one. Raises EngineError."""
    libraries: dict[str, Path | None] = {}
    if "engine" in systems:
        libraries["engine"] = options.engine_lib
        if options.engine_lib is None and find_engine() is None:
            raise needs_engine("`bench`")
    if "stock" in systems:
        stock = options.stock_lib
        if stock is None:
            from mobile_gguf.vendor import stock_lib_dir

            stock = stock_lib_dir()
        if stock is None:
            raise EngineError(
                "there is no stock llama.cpp to compare with: run `mobile-gguf engine build --stock`"
            )
        libraries["stock"] = stock
    for directory in libraries.values():
        if directory is not None and not directory.is_dir():
            raise UsageError(f"{directory} is not a directory with a llama library")
    return libraries


def _prepare(trace: Trace, shape: ModelShape, libraries: dict[str, Path | None], narrate: Narrate) -> Runner:
    known = model_path(trace, shape).exists()
    if not known:
        narrate(f"writing the model: {describe_model(shape)}")
    tenths = 0

    def progress(done: int, total: int) -> None:
        nonlocal tenths
        if 10 * done // total > tenths:
            tenths = 10 * done // total
            narrate(f"  {format_bytes(done)} of {format_bytes(total)}")

    model = ensure_model(trace, shape, progress=progress)
    runner = Runner(model, text_of(trace), libraries, little_k=max(1, trace.k // 2))
    if not known:
        try:
            n_checked = check_routing(runner, trace, next(iter(libraries)))
        except MobileError:
            # a model that was never seen to follow the trace must not be taken for a good one next time
            model.unlink(missing_ok=True)
            raise
        narrate(f"the model routes as the trace does ({n_checked} tokens x layers compared)")
    return runner


def _sweep_all(
    arms: list[Arm], options: BenchOptions, runner: Runner, shape: ModelShape, report: Report,
    narrate: Narrate,
) -> list[Arm]:  # fmt: skip
    """Arms with their settings. Modes of one system under one budget share what the first of them found."""
    choices = SweepChoices(options.threads or default_threads(n_cpus()), options.io_threads)
    found: dict[tuple[str, str, str, OtherCommand | None], Arm] = {}
    tuned = []

    def brief(arm: Arm) -> ArmRun:
        drop_page_cache(runner.model)
        result = runner.run(arm, options.tokens, min(SWEEP_LIMIT_S, options.arm_limit_s))
        narrate(f"sweep: {arm.label} {arm.settings}: {_say(result)}")
        return result

    for arm in arms:
        group = (arm.system, arm.budget, arm.eviction, arm.command)
        if group not in found:
            if arm.system == "stock":
                _, note = stock_load_modes(arm, shape.file_bytes)
                report.notes.extend([note] if note else [])
            found[group], steps = sweep(arm, choices, shape.file_bytes, brief)
            report.sweep.extend(steps)
        best = found[group]
        tuned.append(
            arm.tuned(
                threads=best.threads, io_threads=best.io_threads, load_mode=best.load_mode, repack=best.repack
            )
        )
    return tuned


def _run_rounds(
    arms: list[Arm], options: BenchOptions, runner: Runner, shape: ModelShape, report: Report,
    narrate: Narrate,
) -> None:  # fmt: skip
    """A B C A B C: the disk is measured before and after every run, the run gets the mean."""

    def bandwidth() -> float:
        seed = sum(len(runs) for runs in report.runs.values())
        return measure_bandwidth(
            runner.model, shape.expert_bytes, seconds=options.disk_s, seed=seed
        ).bytes_per_s

    before = bandwidth()
    for repeat in range(options.repeats):
        for arm in arms:
            cached = drop_page_cache(runner.model)
            result = runner.run(arm, options.tokens, options.arm_limit_s)
            result.cached_bytes_before = cached
            result.load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            after = bandwidth()
            result.bandwidth = statistics.fmean([before, after])
            before = after
            report.runs.setdefault(arm.label, []).append(result)
            narrate(
                f"round {repeat + 1} of {options.repeats}: {arm.label} {arm.settings}: {_say(result)}, "
                f"disk {result.bandwidth / 1e6:.0f} MB/s"
            )


def _say(result: ArmRun) -> str:
    if result.error:
        return result.error
    rate = result.tokens_per_s or 0.0
    return f"< {rate:.2f} tokens/s (stopped)" if result.limit_s is not None else f"{rate:.2f} tokens/s"


def _for_json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
