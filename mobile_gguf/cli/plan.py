"""``mobile-gguf plan``: before a model is loaded, what fits where, with which flags, and how fast it is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mobile_gguf.errors import EngineError, MobileError, UsageError
from mobile_gguf.flags import add_arguments
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.memory.promise import promised
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.options.words import MTP

from .chosen import add_chosen_arguments, settle
from .common import load_options, narrate
from .progress import Progress

if TYPE_CHECKING:
    from mobile_gguf.engine.binding import Engine
    from mobile_gguf.engine.devices import Device
    from mobile_gguf.memory.fit import Asked
    from mobile_gguf.memory.machine import Memory
    from mobile_gguf.plan.machine import Measurements
    from mobile_gguf.plan.workload import Workload

_DESCRIPTION = """Say what of a model fits where, which budgets and flags to use, and how many tokens per
second to expect, before anything of it is loaded: from the GGUF's header and a measurement of this machine,
which takes seconds, at most a minute, and is kept. What cannot fit is refused (exit code 1), with what would
instead."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "plan",
        help="say what fits where, and how fast it will be",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    add_chosen_arguments(parser)
    add_arguments(parser, LoadOptions)
    parser.add_argument("--no-measure", action="store_true", help="use only what was measured before")
    parser.add_argument("--measure", action="store_true", help="measure again what is known")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    # what plans and measures is imported only now, so that every other verb starts without it
    from mobile_gguf.memory.block import block_to_load
    from mobile_gguf.memory.fit import asked_of
    from mobile_gguf.plan.machine import Measurements, read_measurements
    from mobile_gguf.plan.planner import make_plan, plan_facts, plan_lines
    from mobile_gguf.plan.refusal import plan_fit
    from mobile_gguf.plan.workload import count_weights, read_workload

    settle(args)
    if args.measure and args.no_measure:
        raise UsageError("give --measure or --no-measure, not both")
    options = make_options(LoadOptions, load_options(args))
    with Progress(sys.stderr) as progress:
        path = resolve_model(args.model, progress)
    info = read_gguf_info(path)
    workload = read_workload(info)
    n_bits = 8 * info.tensor_bytes / max(1, count_weights(info))
    asked = asked_of(info, options)
    devices, notes = _devices(options, asked)
    memory = promised(options, read_memory())
    engine = _engine()
    asked = _measure_buffers(engine, info, asked, memory, devices)
    loaded, why_no_block = block_to_load(info, options, engine, devices, asked, memory)
    if why_no_block and options.speculate == MTP:
        notes.append(f"{why_no_block}: --speculate {MTP} has no effect")
    # what does not fit is refused before a minute is spent on measuring
    fit = plan_fit(loaded, asked, memory, devices, n_bits)
    known = read_measurements()
    measurements = Measurements(known.identity) if args.measure else known
    if not args.no_measure:
        try:
            notes += _measure(info, workload, options, measurements, fit.devices)
        except KeyboardInterrupt:
            narrate("interrupted; what was measured is kept")
            raise
    plan = make_plan(
        info,
        workload,
        measurements,
        options,
        devices=devices,
        memory=memory,
        n_bits=n_bits,
        notes=notes,
        reference=args.model,
        asked=asked,
        loaded=loaded,
    )
    print(json.dumps(plan_facts(plan), ensure_ascii=False) if args.json else "\n".join(plan_lines(plan)))
    return 0


def _devices(options: LoadOptions, asked: Asked) -> tuple[list[Device], list[str]]:
    """The devices that a run would use, and notes. Raises EngineError, FitError if those asked for are not
    there."""
    from mobile_gguf.device.tier import devices_for
    from mobile_gguf.engine.binding import find_engine
    from mobile_gguf.plan.refusal import FitError

    try:
        return devices_for(options, asked, find_engine())
    except EngineError:
        if asked.insists:
            raise
        return [], []  # without an engine nothing is measured either, and a note says so
    except UsageError as error:
        raise FitError(str(error)) from None


def _engine() -> Engine | None:
    from mobile_gguf.engine.binding import find_engine

    try:
        return find_engine()
    except EngineError:
        return None


def _measure_buffers(
    engine: Engine | None, info: GgufInfo, asked: Asked, memory: Memory, devices: Sequence[Device]
) -> Asked:
    """What a context's buffers take is asked of the engine, where there is one; a child reads the header. The
    context is chosen with it, where nobody said one."""
    from mobile_gguf.memory.buffers import with_buffers, with_settled_context
    from mobile_gguf.plan.refusal import compared

    if engine is None:
        return asked

    def measured(one: Asked) -> Asked:
        return with_buffers(engine, info, one, others=compared(one))

    asked = measured(asked)
    return with_settled_context(info, asked, memory, devices, measured) if asked.other_contexts else asked


def _measure(
    info: GgufInfo,
    workload: Workload,
    options: LoadOptions,
    measurements: Measurements,
    devices: Sequence[Device],
) -> list[str]:
    """Measure what is missing; returns notes on what could not be."""
    from mobile_gguf.plan.ggml import Ggml
    from mobile_gguf.plan.measure import expected_seconds, measure, steps_for
    from mobile_gguf.plan.workload import make_settings

    settings = make_settings(info, options, 1.0)
    try:
        ggml = Ggml()
        ks = sorted({settings.k, settings.little_k} - {0}) or [1]
        steps = steps_for(
            info, workload, ks, settings.threads, settings.io_threads,
            threads_batch=settings.threads_batch, flash_attn=settings.flash_attn,
            devices=devices, ggml=ggml, known=measurements.get,
        )  # fmt: skip
    except MobileError as error:
        return [f"nothing was measured: {error}"]
    seconds = expected_seconds(measurements, steps)
    if seconds:
        narrate(f"measuring this machine, about {max(1, round(seconds))} s")
    with Progress(sys.stderr) as progress:
        return measure(measurements, steps, progress)
