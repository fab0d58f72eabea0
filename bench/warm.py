"""What the warm set is worth: ``python -m mobile_gguf.bench.warm TRACE``.

The replay model (``bench --trace``) started anew and decoding the first tokens of the trace: cold; with the
warm set that the same tokens leave (a second start on the same text), and that the rest of the trace leaves
(on other text of its kind); the prompt at once, or after the warm set was read, as when a person
types. Beside them all experts resident. All arms run in turn, round after round, each in a process under its
own memory cap. Prints tokens per second and ratios; ``--out FOLDER`` keeps them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.sizes import GIB, MIB

from .arm import Arm, Runner
from .build import ensure_model
from .geometry import scale_model
from .hardware import n_cpus
from .harness import find_libraries
from .plan import BenchOptions, absolute_bytes, budget_bytes
from .record import begin_record, keep_record
from .trace import read_trace

_CAP_SLACK_BYTES = 900 * MIB
_COLD = "cold"
_ARMS = (_COLD, "same text, at once", "same text", "other text, at once", "other text")


def _arms(runner: Runner, cold: Arm, args: argparse.Namespace) -> dict[str, Arm]:
    """The arms of one budget, with the warm sets that a run over each text leaves."""
    worth = {}
    rest = runner.trace.n_decode - args.tokens
    for text, offset, n in (("same", 0, args.tokens), ("other", args.tokens, rest)):
        left = runner.run(cold.tuned(offset=offset), n, args.limit)
        if left.worth is None:
            raise EngineError(f"the run that leaves a warm set failed: {left.error or 'it took too long'}")
        worth[text] = tuple((layer, expert) for layer, expert in left.worth)
    return {_COLD: cold} | {
        name: cold.tuned(warm=worth[name.split()[0]], idle_s=0.0 if "at once" in name else args.idle)
        for name in _ARMS[1:]
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, in the order in which they were made."""
    trace = read_trace(args.trace)
    if trace.n_decode <= args.tokens:
        raise UsageError(
            f"{args.trace} has {trace.n_decode} decoded tokens: with --tokens {args.tokens} none are left"
            " that are another text"
        )
    shape = scale_model(trace, absolute_bytes(args.size, "--size"))
    runner = Runner(
        ensure_model(trace, shape), trace, find_libraries(BenchOptions(), {"engine"}), trace.k // 2
    )
    arms: list[tuple[str, str, Arm]] = []
    for budget in args.budget.split(","):
        n_bytes = budget_bytes(budget, shape)
        cold = Arm(
            "engine", "exact", budget, n_bytes, n_bytes + _CAP_SLACK_BYTES, threads=args.threads,
            threads_auto=True,
        )  # fmt: skip
        arms += [(budget, name, arm) for name, arm in _arms(runner, cold, args).items()]
    n_bytes = shape.all_expert_bytes
    resident = Arm(
        "engine", "exact", "100%", n_bytes, n_bytes + 4 * GIB, True, args.threads, threads_auto=True
    )
    arms.append(("100%", "resident", resident))
    runs = []
    for round_number in range(args.rounds):
        for budget, name, arm in arms[:: 1 if round_number % 2 == 0 else -1]:
            result = runner.run(arm, args.tokens, args.limit)
            speed = result.tokens_per_s
            said = f"{speed:.2f} tokens/s" if speed else result.error
            print(f"{round_number + 1}: {budget}, {name}: {said}", file=sys.stderr, flush=True)
            facts = {name: value for name, value in asdict(result).items() if name not in ("worth", "ids")}
            runs.append(
                {"round": round_number, "budget": budget, "arm": name, "tokens_per_s": speed, "run": facts}
            )
    return runs


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown; ratios are of the same round."""
    by_round = {(run["round"], run["budget"], run["arm"]): run for run in result["runs"]}
    rounds = sorted({run["round"] for run in result["runs"]})

    def speeds(budget: str, arm: str) -> list[float | None]:
        return [by_round[number, budget, arm]["tokens_per_s"] for number in rounds]

    def ratio(of: list[float | None], over: list[float | None]) -> str:
        found = [a / b for a, b in zip(of, over, strict=True) if a and b]
        return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})" if found else "failed"

    lines = [
        "# The warm set",
        "",
        f"{result['hardware']}. Replay of {result['trace']}, the first {result['tokens']} tokens after the"
        f" prompt, exact, {result['rounds']} interleaved rounds; median (range). At once: the prompt comes"
        " right after the load; otherwise when the warm set was read.",
        "",
        "| budget | start | tokens/s | of resident | of cold | misses a token | warm set read, used |",
        "|---|---|---|---|---|---|---|",
    ]
    for budget, arm in dict.fromkeys((run["budget"], run["arm"]) for run in result["runs"]):
        own = speeds(budget, arm)
        done = [by_round[number, budget, arm]["run"] for number in rounds]
        median = [speed for speed in own if speed]
        misses = [run["counters"]["n_misses"] / run["n_tokens"] for run in done if run["counters"]]
        warm = [run["warm"] for run in done if run["warm"]]
        cold = "" if arm == "resident" else ratio(own, speeds(budget, _COLD))
        used = f"{warm[0]['n_read']}, {warm[0]['n_used']}" if warm else ""
        lines.append(
            f"| {budget} | {arm} | {f'{statistics.median(median):.1f}' if median else 'failed'}"
            f" | {ratio(own, speeds('100%', 'resident'))} | {cold}"
            f" | {f'{statistics.median(misses):.1f}' if misses else ''} | {used} |"
        )
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.warm", description=__doc__)
    parser.add_argument("trace", type=Path, help="a route trace, such as qwen.route.csv.gz")
    parser.add_argument("--size", default="4GiB", help="of the replay model")
    parser.add_argument("--budget", default="25%,50%")
    parser.add_argument("--threads", "-t", type=int, default=n_cpus())
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds to wait for the warm set, at most")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of decoding in one run")
    parser.add_argument("--out", type=Path, help="folder for warm.json and warm.md")
    args = parser.parse_args(argv)
    result = {
        **begin_record("warm", argv),
        "trace": args.trace.name,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "runs": measure(args),
    }
    text = page(result)
    keep_record(args.out, "warm", result, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
