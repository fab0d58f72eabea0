"""Speed of prompts: ``python -m mobile_gguf.bench.prompts TRACE``.

The replay model (``bench --trace``) started anew and given a prompt, the trace's tokens over and over: by
budget, length and micro-batch; beside them everything in memory, in the engine and in stock llama.cpp, both
repacked. All arms run in turn, round after round, each in a process under its own memory cap. Prints tokens
per second beside what the plan foresees, which is measured first; ``--out FOLDER`` keeps them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.memory.budget import stored_share
from mobile_gguf.memory.microbatch import DEFAULT_UBATCH
from mobile_gguf.options import LoadOptions
from mobile_gguf.plan.disk import disk_name
from mobile_gguf.plan.machine import Measurements, identify_machine
from mobile_gguf.plan.measure import measure as measure_machine
from mobile_gguf.plan.measure import steps_for
from mobile_gguf.plan.prompt import predict_prompts
from mobile_gguf.plan.workload import make_settings, read_workload
from mobile_gguf.sizes import GIB

from .arm import Arm
from .plan import budget_bytes
from .replay import engine_arm, median_range, open_replay, record_run, replay_parser, run_module

_CAP_SLACK_BYTES = 3 * GIB  # scores of a large micro-batch
_ENGINE, _STOCK = "engine", "stock"


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _ubatches(n_tokens: int, asked: Sequence[int]) -> list[int]:
    """Those that make a difference to a prompt of so many tokens."""
    larger = [n for n in sorted(asked) if n >= n_tokens]
    return [n for n in asked if n <= min([*larger, max(asked)])]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, in the order in which they were made."""
    _, shape, runner = open_replay(args, {_ENGINE, _STOCK})
    arms: list[tuple[Arm, float | None]] = []
    foresee = _Foresight(runner.model, args.threads, len(runner.text.ids))
    for n_tokens in _numbers(args.prompt):
        for n_ubatch in _ubatches(n_tokens, _numbers(args.ubatch)):
            for budget in args.budget.split(","):
                arm = engine_arm(
                    budget, budget_bytes(budget, shape), shape, _CAP_SLACK_BYTES, args.threads,
                    repack=True, prompt_tokens=n_tokens, n_ubatch=n_ubatch,
                )  # fmt: skip
                arms.append((arm, foresee(arm)))
                if arm.resident:
                    arms.append((arm.tuned(system=_STOCK, load_mode="no-mmap"), None))
    runs: list[dict[str, Any]] = []
    for round_number in range(args.rounds):
        for arm, foreseen in arms[:: 1 if round_number % 2 == 0 else -1]:
            run = runner.run(arm, 0, args.limit)
            speed = arm.prompt_tokens / run.prompt_s if run.prompt_s else None
            record_run(
                runs, run, speed,
                round=round_number, system=arm.system, budget=arm.budget, prompt=arm.prompt_tokens,
                ubatch=arm.n_ubatch, foreseen=foreseen,
            )  # fmt: skip
    return runs


class _Foresight:
    """What the plan says of an arm, by this machine as it is measured now."""

    def __init__(self, model: Path, threads: int, n_different: int) -> None:
        self.n_different = n_different
        self.options = LoadOptions(threads=threads)
        self.info = read_gguf_info(model)
        self.workload = read_workload(self.info)
        self.known = Measurements(identify_machine())
        steps = steps_for(self.info, self.workload, [self.info.n_expert_used], threads)
        for problem in measure_machine(self.known, steps):
            print(problem)

    def __call__(self, arm: Arm) -> float | None:
        share = 1.0 if arm.resident else stored_share(self.info, arm.budget_bytes)
        settings = make_settings(self.info, self.options, share, n_ctx=1 << 20, n_ubatch=arm.n_ubatch)
        disk = disk_name(self.info.path)
        found = predict_prompts(
            self.info, self.workload, self.known, replace(settings, io_threads=arm.io_threads), disk,
            [arm.prompt_tokens], self.n_different,
        )  # fmt: skip
        return found[0].predicted_tps if found else None


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown; ratios are of the same round."""
    runs = result["runs"]
    speeds: dict[tuple[Any, ...], dict[int, float]] = {}
    for run in runs:
        if run["tokens_per_s"]:
            speeds.setdefault(_key(run), {})[run["round"]] = run["tokens_per_s"]
    lines = [
        "# Prompts",
        "",
        f"{result['hardware']}. Replay of {result['trace']}, a first prompt right after the load, exact,"
        f" {result['rounds']} interleaved rounds; tokens per second, median (range). Of resident: the same"
        f" prompt with everything in memory, micro-batches of {DEFAULT_UBATCH}, round by round.",
        "",
        "| prompt | micro-batch | budget | tokens/s | of resident | first token after, s | stalled, s"
        " | read, GiB | foreseen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys(map(_key, runs)):
        system, budget, prompt, ubatch = key
        own = speeds.get(key, {})
        resident = speeds.get(_resident_key(speeds, prompt, ubatch), {})
        ratios = [own[n] / resident[n] for n in own if n in resident]
        of_arm = [run for run in runs if _key(run) == key]
        counters = [run["run"]["prompt_counters"] for run in of_arm if run["run"]["prompt_counters"]]
        stall = f"{statistics.median(c['stall_us'] for c in counters) / 1e6:.2f}" if counters else ""
        read = f"{statistics.median(c['bytes_read'] for c in counters) / GIB:.2f}" if counters else ""
        after = f"{prompt / statistics.median(own.values()):.2f}" if own else ""
        foreseen = of_arm[0]["foreseen"]
        error = (
            f"{foreseen:.0f} ({foreseen / statistics.median(own.values()) - 1:+.0%})"
            if foreseen and own
            else ""
        )
        lines.append(
            f"| {prompt} | {ubatch} | {budget if system == _ENGINE else _STOCK}"
            f" | {median_range(list(own.values()))} | {median_range(ratios, 2) if ratios else ''}"
            f" | {after} | {stall} | {read} | {error} |"
        )
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["system"], run["budget"], run["prompt"], run["ubatch"]


def _resident_key(speeds: dict[tuple[Any, ...], Any], prompt: int, ubatch: int) -> tuple[Any, ...]:
    """Everything in memory, with llama.cpp's micro-batch if that was run."""
    found = [key for key in speeds if key[:3] == (_ENGINE, "100%", prompt)]
    return next((key for key in found if key[3] == DEFAULT_UBATCH), (_ENGINE, "100%", prompt, ubatch))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = replay_parser("prompts", __doc__, budget="12%,25%,50%,100%", tokens=0)
    parser.add_argument("--prompt", default="28,2000", help="lengths in tokens")
    parser.add_argument("--ubatch", default="512,1024,2048", help="micro-batches")
    return run_module("prompts", argv, parser, measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
