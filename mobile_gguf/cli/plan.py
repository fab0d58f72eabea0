"""``mobile-gguf plan``: before loading a model, what fits where, with which flags, and how fast it will
be."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import MobileError, UsageError
from ..flags import add_arguments, given
from ..gguf_info import GgufInfo, read_gguf_info
from ..options import LoadOptions, declared, make_options
from ..resolve import resolve_model
from ..sizes import parse_size
from .common import Progress, narrate

if TYPE_CHECKING:
    from ..plan.fit import DeviceMemory
    from ..plan.machine import Measurements
    from ..plan.workload import Workload

_DESCRIPTION = """Say what of a model fits where, which budgets and flags to use, and how many tokens per
second to expect, before anything of it is loaded: from the GGUF's header and a measurement of this machine,
which takes seconds, at most a minute, and is kept. What cannot fit is refused (exit code 1), with what would
instead."""
_PLANNED = (
    "ram_budget", "vram_budget", "rpc", "miss", "placement", "mode", "gamma", "importance", "head_threshold",
    "little_k", "n_ctx", "n_ubatch", "threads", "io_threads", "eviction", "flash_attn",
)  # fmt: skip


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "plan",
        help="say what fits where, and how fast it will be",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, a name from `mobile-gguf list`, or demo")
    known = declared(LoadOptions)
    add_arguments(parser, LoadOptions, skip=[name for name in known if name not in _PLANNED])
    if "vram_budget" not in known:
        parser.add_argument(
            "--vram-budget", metavar="SIZE", default=argparse.SUPPRESS,
            help="device memory for experts: 512MiB, 2G, 40%% of them, auto, or off",
        )  # fmt: skip
    if "rpc" not in known:
        parser.add_argument(
            "--rpc", metavar="HOST:PORT", default=argparse.SUPPRESS, help="RPC servers, by commas"
        )
    parser.add_argument(
        "--no-measure", action="store_true", help="use what was measured before, or no speeds"
    )
    parser.add_argument("--measure", action="store_true", help="measure again what is known")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    # what measures needs the engine's library; every other verb starts without it
    from ..plan.fit import plan_fit
    from ..plan.machine import Measurements, read_measurements
    from ..plan.planner import asked_of, make_plan, plan_facts, plan_lines
    from ..plan.workload import count_weights, read_workload

    if args.measure and args.no_measure:
        raise UsageError("give --measure or --no-measure, not both")
    options = make_options(LoadOptions, given(args, LoadOptions))
    with Progress(sys.stderr) as progress:
        path = resolve_model(args.model, progress)
    info = read_gguf_info(path)
    workload = read_workload(info)
    devices, vram, notes = _devices(args, options)
    from ..memory import read_memory

    # what does not fit is refused before a minute is spent on measuring
    plan_fit(info, asked_of(info, options, vram=vram), read_memory(), devices, count_weights(info))
    known = read_measurements()
    measurements = Measurements(known.identity) if args.measure else known
    if not args.no_measure:
        try:
            notes += _measure(info, workload, options, measurements, args)
        except KeyboardInterrupt:
            narrate("interrupted; what was measured is kept")
            raise
    plan = make_plan(
        info,
        workload,
        measurements,
        options,
        devices=devices,
        vram=vram,
        rpc=getattr(args, "rpc", None),
        n_weights=count_weights(info),
        notes=notes,
    )
    print(json.dumps(plan_facts(plan), ensure_ascii=False) if args.json else "\n".join(plan_lines(plan)))
    return 0


def _devices(
    args: argparse.Namespace, options: LoadOptions
) -> tuple[list[DeviceMemory], str | None, list[str]]:
    """The devices to plan for, the budget for experts there (None: no device), and notes."""
    from ..plan.fit import DeviceMemory, FitError
    from ..plan.ggml import GPU, IGPU, Ggml

    rpc = getattr(args, "rpc", None)
    vram = getattr(args, "vram_budget", None)
    asked = None if vram is None else str(vram)
    if asked == "off":
        return [], None, []
    if asked is not None:
        parse_size(asked)
    try:
        ggml = Ggml()
        found = [device for device in ggml.devices() if device.kind in (GPU, IGPU)]
        for endpoint in (rpc or "").split(","):
            if endpoint.strip():
                found += ggml.rpc_devices(endpoint.strip())
    except MobileError as error:
        if rpc or asked not in (None, "auto"):
            raise
        return [], None, [f"no devices: {error}"]
    if not found:
        if asked not in (None, "auto"):
            raise FitError(
                f"--vram-budget {asked}: there is no device here; build the engine for one (`mobile-gguf "
                "engine build --backend ...`), give --rpc HOST:PORT, or plan without"
            )
        return [], None, []
    return [DeviceMemory(one.name, one.free_bytes, one.total_bytes) for one in found], asked or "auto", []


def _measure(
    info: GgufInfo,
    workload: Workload,
    options: LoadOptions,
    measurements: Measurements,
    args: argparse.Namespace,
) -> list[str]:
    """Measure what is missing; returns notes on what could not be."""
    from ..plan.ggml import CPU, Ggml
    from ..plan.measure import expected_seconds, measure, steps_for
    from ..plan.settings import make_settings

    settings = make_settings(info, options, 1.0)
    try:
        ggml = Ggml()
        devices: list[Any] = []
        if str(getattr(args, "vram_budget", "")) != "off":
            devices = [device for device in ggml.devices() if device.kind != CPU]
            for endpoint in (getattr(args, "rpc", None) or "").split(","):
                if endpoint.strip():
                    devices += ggml.rpc_devices(endpoint.strip())
        ks = sorted({settings.k, settings.little_k} - {0}) or [1]
        steps = steps_for(
            info, workload, ks, settings.threads, settings.io_threads, devices=devices, ggml=ggml
        )
    except MobileError as error:
        return [f"nothing was measured: {error}"]
    seconds = expected_seconds(measurements, steps)
    if seconds:
        narrate(f"measuring this machine, about {max(1, round(seconds))} s")
    with Progress(sys.stderr) as progress:
        return measure(measurements, steps, progress)
