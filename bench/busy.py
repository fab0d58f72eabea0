"""Speed on a machine that is not idle: ``python -m mobile_gguf.bench.busy``.

The replay model (``bench --trace``) beside none, one and two loops that never sleep, each a process of its
own: the engine at a budget and with everything in memory, with threads that follow the machine, with all
and with one; stock llama.cpp with everything in memory; with ``--before FOLDER`` another build of the
engine. All arms run in turn, round after round, each in a process under its own memory cap. Prints tokens
per second; ``--out FOLDER`` keeps them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobile_gguf.sizes import MIB

from .arm import Arm, Runner
from .geometry import ModelShape
from .plan import budget_bytes
from .replay import engine_arm, median_range, open_replay, record_run, replay_parser, run_module

_CAP_SLACK_BYTES = 900 * MIB
_LOOP = """import sys
from mobile_gguf.bench.child import end_with_parent
end_with_parent(int(sys.argv[1]))
while True: pass"""


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """So many processes that want a processor all the time."""
    command = [sys.executable, "-c", _LOOP, str(os.getpid())]
    loops = [subprocess.Popen(command) for _ in range(number)]
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
        arm = engine_arm(budget, budget_bytes(budget, shape), shape, _CAP_SLACK_BYTES, threads)
        arms += [("engine", arm.tuned(threads_auto=True)), ("engine", arm), ("engine", arm.tuned(threads=1))]
        if before:
            arms.append(("before", arm))
        if arm.resident:
            arms.append(("stock", arm.tuned(system="stock", load_mode="no-mmap")))
    return arms


def _name(library: str, arm: Arm) -> str:
    return f"{library} {arm.budget} -t {arm.threads}{' auto' if arm.threads_auto else ''}"


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, in the order in which they were made."""
    _, shape, runner = open_replay(args, {"engine", "stock"})
    runners: dict[str, Runner] = {"engine": runner, "stock": runner}
    for name, folder in (("before", args.before), ("engine", args.engine)):
        if folder:
            runners[name] = replace(runner, libraries={**runner.libraries, "engine": folder})
    arms = _arms(args.budget.split(","), shape, args.threads, args.before is not None)
    runs: list[dict[str, Any]] = []
    for round_number in range(args.rounds):
        for loops in (int(text) for text in args.loops.split(",")):
            for library, arm in arms:
                with busy_loops(loops):
                    run = runners[library].run(arm, args.tokens, args.limit)
                name = _name(library, arm)
                record_run(runs, run, run.tokens_per_s, round=round_number, loops=loops, arm=name)
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
        return median_range(speeds)

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
    parser = replay_parser("busy", __doc__, budget="25%,100%", tokens=64)
    parser.add_argument("--loops", default="0,1,2", help="busy loops beside a run")
    parser.add_argument(
        "--engine", type=Path, help="folder of the engine's libraries, if not the installed one's"
    )
    parser.add_argument("--before", type=Path, help="folder of another build's libraries, to compare with")
    return run_module("busy", argv, parser, measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
