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
from collections.abc import Sequence
from typing import Any

from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.sizes import MIB

from .arm import Arm, Runner
from .plan import budget_bytes
from .replay import engine_arm, median_range, open_replay, record_run, replay_parser, run_module

_CAP_SLACK_BYTES = 900 * MIB
_COLD = "cold"
_ARMS = (_COLD, "same text, at once", "same text", "other text, at once", "other text")


def _arms(runner: Runner, cold: Arm, args: argparse.Namespace) -> dict[str, Arm]:
    """The arms of one budget, with the warm sets that a run over each text leaves."""
    worth = {}
    rest = len(runner.text.ids) - runner.text.n_prompt - args.tokens
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
    trace, shape, runner = open_replay(args, {"engine"})
    if trace.n_decode <= args.tokens:
        raise UsageError(
            f"{args.trace} has {trace.n_decode} decoded tokens: with --tokens {args.tokens} none are left"
            " that are another text"
        )

    def arm_of(budget: str, n_bytes: int) -> Arm:
        return engine_arm(budget, n_bytes, shape, _CAP_SLACK_BYTES, args.threads, threads_auto=True)

    arms: list[tuple[str, str, Arm]] = []
    for budget in args.budget.split(","):
        cold = arm_of(budget, budget_bytes(budget, shape))
        arms += [(budget, name, arm) for name, arm in _arms(runner, cold, args).items()]
    arms.append(("100%", "resident", arm_of("100%", shape.all_expert_bytes)))
    runs: list[dict[str, Any]] = []
    for round_number in range(args.rounds):
        for budget, name, arm in arms[:: 1 if round_number % 2 == 0 else -1]:
            run = runner.run(arm, args.tokens, args.limit)
            record_run(runs, run, run.tokens_per_s, round=round_number, budget=budget, arm=name)
    return runs


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown; ratios are of the same round."""
    by_round = {(run["round"], run["budget"], run["arm"]): run for run in result["runs"]}
    rounds = sorted({run["round"] for run in result["runs"]})

    def speeds(budget: str, arm: str) -> list[float | None]:
        return [by_round[number, budget, arm]["tokens_per_s"] for number in rounds]

    def ratio(of: list[float | None], over: list[float | None]) -> str:
        found = [a / b for a, b in zip(of, over, strict=True) if a and b]
        return median_range(found, 2)

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
    parser = replay_parser("warm", __doc__, budget="25%,50%", tokens=96)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds to wait for the warm set, at most")
    return run_module("warm", argv, parser, measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
