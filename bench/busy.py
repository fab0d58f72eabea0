"""Speed on a machine that is not idle: ``python -m mobile_gguf.bench.busy``.

The replay model (``bench --trace``) beside none, one and two loops that never sleep, each a process of its
own: the engine at a budget and with everything in memory, with threads that follow the machine, with all
and with one; stock llama.cpp with everything in memory; with ``--before FOLDER`` another build of the
engine. All arms run in turn, round after round, each in a process under its own memory cap. Prints tokens
per second; ``--out FOLDER`` keeps them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobile_gguf.sizes import GIB, MIB

from .arm import Arm, Runner
from .build import ensure_model
from .geometry import ModelShape, scale_model
from .hardware import n_cpus
from .harness import find_libraries
from .plan import BenchOptions, absolute_bytes, budget_bytes
from .record import begin_record, keep_record
from .trace import read_trace

_CAP_SLACK_BYTES = 900 * MIB
_LOOP = "while True: pass"


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """So many processes that want a processor all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _arms(budgets: Sequence[str], shape: ModelShape, threads: int, before: bool) -> list[tuple[str, Arm]]:
    """(library, arm) of everything that is compared."""
    arms = []
    for budget in budgets:
        n_bytes = budget_bytes(budget, shape)
        resident = n_bytes >= shape.all_expert_bytes
        arm = Arm(
            "engine",
            "exact",
            budget,
            n_bytes,
            n_bytes + (4 * GIB if resident else _CAP_SLACK_BYTES),
            resident,
            threads,
        )
        arms += [("engine", arm.tuned(threads_auto=True)), ("engine", arm), ("engine", arm.tuned(threads=1))]
        if before:
            arms.append(("before", arm))
        if resident:
            arms.append(("stock", arm.tuned(system="stock", load_mode="no-mmap")))
    return arms


def _name(library: str, arm: Arm) -> str:
    return f"{library} {arm.budget} -t {arm.threads}{' auto' if arm.threads_auto else ''}"


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, in the order in which they were made."""
    trace = read_trace(args.trace)
    shape = scale_model(trace, absolute_bytes(args.size, "--size"))
    model = ensure_model(trace, shape)
    libraries = find_libraries(BenchOptions(versus=("stock",)), {"engine", "stock"})
    runners = {name: Runner(model, trace, libraries, trace.k // 2) for name in ("engine", "stock")}
    if args.before:
        runners["before"] = Runner(model, trace, {**libraries, "engine": args.before}, trace.k // 2)
    if args.engine:
        runners["engine"] = Runner(model, trace, {**libraries, "engine": args.engine}, trace.k // 2)
    arms = _arms(args.budget.split(","), shape, args.threads, args.before is not None)
    runs = []
    for round_number in range(args.rounds):
        for loops in (int(text) for text in args.loops.split(",")):
            for library, arm in arms:
                with busy_loops(loops):
                    result = runners[library].run(arm, args.tokens, args.limit)
                speed = result.tokens_per_s
                said = f"{speed:.2f} tokens/s" if speed else result.error
                print(
                    f"{round_number + 1}: {loops} loops, {_name(library, arm)}: {said}",
                    file=sys.stderr,
                    flush=True,
                )
                runs.append(
                    {"round": round_number, "loops": loops, "arm": _name(library, arm), "tokens_per_s": speed}
                    | {"run": asdict(result)}
                )
    return runs


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown."""
    runs = result["runs"]
    loops = sorted({run["loops"] for run in runs})
    names = list(dict.fromkeys(run["arm"] for run in runs))

    def cell(name: str, number: int) -> str:
        speeds = [
            r["tokens_per_s"] for r in runs if r["arm"] == name and r["loops"] == number and r["tokens_per_s"]
        ]
        return (
            f"{statistics.median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f})" if speeds else "failed"
        )

    heads = ["quiet" if number == 0 else f"{number} busy" for number in loops]
    lines = [
        "# Speed beside busy loops",
        "",
        f"{result['hardware']}. Replay of {result['trace']}, {result['tokens']} tokens after the prompt,"
        f" exact, {result['rounds']} interleaved rounds; tokens per second, median (range). The other work of"
        " a shared machine is in all of them alike: take the ratios.",
        "",
        "| arm | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
        *(f"| {name} | " + " | ".join(cell(name, number) for number in loops) + " |" for name in names),
    ]
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.busy", description=__doc__)
    parser.add_argument("trace", type=Path, help="a route trace, such as qwen.route.csv.gz")
    parser.add_argument("--size", default="4GiB", help="of the replay model")
    parser.add_argument("--budget", default="25%,100%")
    parser.add_argument("--loops", default="0,1,2", help="busy loops beside a run")
    parser.add_argument("--threads", "-t", type=int, default=n_cpus())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of decoding in one run")
    parser.add_argument(
        "--engine", type=Path, help="folder of the engine's libraries, if not the installed one's"
    )
    parser.add_argument("--before", type=Path, help="folder of another build's libraries, to compare with")
    parser.add_argument("--out", type=Path, help="folder for busy.json and busy.md")
    args = parser.parse_args(argv)
    result = {
        **begin_record("busy", argv),
        "trace": args.trace.name,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "runs": measure(args),
    }
    text = page(result)
    keep_record(args.out, "busy", result, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
