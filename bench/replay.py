"""What the measuring modules of the replay model share: command line, model, record, a table's cells."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobile_gguf.sizes import GIB

from .arm import Arm, ArmRun, Runner, text_of
from .build import ensure_model
from .geometry import ModelShape, scale_model
from .hardware import n_cpus
from .harness import find_libraries
from .plan import BenchOptions, absolute_bytes
from .record import begin_record, keep_record
from .trace import Trace, read_trace

Measure = Callable[[argparse.Namespace], list[dict[str, Any]]]
_TOO_MUCH = ("worth", "ids")  # of a run, for a record


def replay_parser(module: str, text: str | None, *, budget: str, tokens: int) -> argparse.ArgumentParser:
    """The command line of ``python -m mobile_gguf.bench.MODULE TRACE``, with these defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m mobile_gguf.bench.{module}", description=text)
    parser.add_argument("trace", type=Path, help="a route trace, such as qwen.route.csv.gz")
    parser.add_argument("--size", default="4GiB", help="of the replay model")
    parser.add_argument("--budget", default=budget)
    parser.add_argument("--threads", "-t", type=int, default=n_cpus())
    parser.add_argument("--tokens", type=int, default=tokens, help="decoded in a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of decoding in one run")
    parser.add_argument("--out", type=Path, help=f"folder for {module}.json and {module}.md")
    return parser


def open_replay(args: argparse.Namespace, systems: set[str]) -> tuple[Trace, ModelShape, Runner]:
    """The trace, its model, which is written if it is missing, and what runs it on these systems."""
    trace = read_trace(args.trace)
    shape = scale_model(trace, absolute_bytes(args.size, "--size"))
    libraries = find_libraries(BenchOptions(versus=("stock",)), systems)
    return trace, shape, Runner(ensure_model(trace, shape), text_of(trace), libraries, trace.k // 2)


def engine_arm(
    budget: str, n_bytes: int, shape: ModelShape, slack_bytes: int, threads: int, **more: Any
) -> Arm:
    """The engine, exact, in a budget; ``slack_bytes`` is the cap beyond it where experts are streamed."""
    resident = n_bytes >= shape.all_expert_bytes
    slack = 4 * GIB if resident else slack_bytes
    return Arm("engine", "exact", budget, n_bytes, n_bytes + slack, resident, threads, **more)


def record_run(runs: list[dict[str, Any]], run: ArmRun, speed: float | None, **what: Any) -> None:
    """Add a run to the record and say it. ``what`` it is, ``round`` first."""
    facts = {name: value for name, value in asdict(run).items() if name not in _TOO_MUCH}
    runs.append({**what, "tokens_per_s": speed, "run": facts})
    number, *words = what.values()
    said = f"{speed:.2f} tokens/s" if speed else run.error
    print(f"{number + 1}: {', '.join(map(str, words))}: {said}", file=sys.stderr, flush=True)


def median_range(values: Sequence[float], digits: int = 1) -> str:
    """The median, with the smallest and the largest; "failed" for none."""
    if not values:
        return "failed"
    numbers = (statistics.median(values), min(values), max(values))
    return "{} ({}-{})".format(*(f"{number:.{digits}f}" for number in numbers))


def run_module(
    module: str,
    argv: Sequence[str] | None,
    parser: argparse.ArgumentParser,
    measure: Measure,
    page: Callable[[dict[str, Any]], str],
) -> int:
    """Parse, measure, keep and print."""
    args = parser.parse_args(argv)
    result = {
        **begin_record(module, argv),
        "trace": args.trace.name,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "runs": measure(args),
    }
    text = page(result)
    keep_record(args.out, module, result, text)
    print(text, end="")
    return 0
