"""What ``mobile-gguf plan`` foresees against what comes: python -m mobile_gguf.bench.plan_accuracy --trace
FILE --replay MODEL, or --devices

Every configuration is measured anew just before and after it runs, rounds are interleaved, and nothing that a
run taught is used, but for the column that says so. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.plan.machine import improved

from .hardware import describe_hardware
from .plan_runs import DEVICE_CASES, HOST_CASES, Case, Result, foresee, mean, measure_anew, run, server_of
from .trace import Trace, read_trace


def main() -> int:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", action="store_true", help="the demo with an RPC server as its device")
    parser.add_argument("--trace", type=Path, help="the routing that the replay model follows")
    parser.add_argument("--replay", type=Path, help="the model that `mobile-gguf bench` wrote")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if bool(args.trace) != bool(args.replay) or not (args.devices or args.trace):
        parser.error("give --trace and --replay, or --devices, or all three")
    trace = read_trace(args.trace) if args.trace else None
    cases = (HOST_CASES if args.trace else ()) + (DEVICE_CASES if args.devices else ())
    results = {case: Result(case) for case in cases}
    try:
        run_all(results, args.rounds, args.replay, trace)
    except KeyboardInterrupt:
        print("interrupted: what was finished is written", file=sys.stderr)
    finished = [one for one in results.values() if one.actual]
    if finished:
        write(args.out, finished, describe_hardware(resolve_model("demo")))
    return 0


def run_all(results: dict[Case, Result], rounds: int, replay: Path, trace: Trace | None) -> None:
    """All cases, A B C A B C."""
    for number in range(rounds):
        for case, result in results.items():
            info = read_gguf_info(resolve_model("demo") if case.model == "demo" else replay)
            with server_of(case) as rpc:
                before = measure_anew(info, case, rpc)
                actual, n_tokens, big_share = run(case, info, trace, rpc)
                # a machine with other work to do is another one a moment later: the mean of before and after
                pairs = [
                    foresee(case, info, one, n_tokens, result.lesson, rpc)
                    for one in (before, measure_anew(info, case, rpc))
                ]
            plain, taught = (mean(list(one)) for one in zip(*pairs, strict=True))
            result.predicted.append(plain.predicted_tps)
            result.low.append(plain.low)
            result.high.append(plain.high)
            result.actual.append(actual)
            result.loads.append(os.getloadavg()[0])
            if number:
                result.learnt.append(taught.predicted_tps)
            result.lesson = improved(result.lesson, math.log(actual / plain.predicted_tps), big_share)
            name = f"{case.model} {case.mode} {case.budget} t={case.threads} {case.device}"
            text = f"{name}: {actual:.2f} tokens/s, predicted {plain.predicted_tps:.2f}"
            print(f"{text}, load {result.loads[-1]:.1f}", file=sys.stderr, flush=True)


def write(out: Path, results: Sequence[Result], hardware: str) -> None:
    """OUT.json and OUT.md."""
    median = statistics.median
    errors = [abs(one.error) for one in results]
    inside = sum(median(one.low) <= median(one.actual) <= median(one.high) for one in results)
    lines = [
        "| model | mode | RAM | threads | device | predicted (band) | actual (spread) | error | learnt |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    learnt_errors = []
    for one in results:
        case = one.case
        learnt = "-"
        if one.learnt and len(one.actual) > 1:
            learnt_errors.append(median(one.learnt) / median(one.actual[1:]) - 1)
            learnt = f"{learnt_errors[-1]:+.0%}"
        foreseen = f"{median(one.predicted):.1f} ({median(one.low):.1f}-{median(one.high):.1f})"
        came = f"{median(one.actual):.1f} ({min(one.actual):.1f}-{max(one.actual):.1f})"
        lines.append(
            f"| {case.model} | {case.mode} | {case.budget} | {case.threads} | {case.device} "
            f"| {foreseen} | {came} | {one.error:+.0%} | {learnt} |"
        )
    loads = [load for one in results for load in one.loads]
    lines += [
        "",
        f"- median error {median(errors):.0%} over {len(results)} configurations, largest {max(errors):.0%}; "
        f"{inside} inside the band",
        f"- command: `python -m mobile_gguf.bench.plan_accuracy {shlex.join(map(_shown, sys.argv[1:]))}`",
        f"- machine: {hardware}; load average {min(loads):.1f}-{max(loads):.1f}, median {median(loads):.1f}",
    ]
    if learnt_errors:
        error = median(map(abs, learnt_errors))
        lines.append(f"- with what the rounds before taught: median error {error:.0%}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = [asdict(one) | {"error": one.error} for one in results]
    text = json.dumps({"hardware": hardware, "results": found}, indent=1)
    out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print("\n".join(lines))


def _shown(word: str) -> str:
    """A path by its name: where it lay on this machine is of no use elsewhere."""
    return Path(word).name if Path(word).is_file() else word


if __name__ == "__main__":
    sys.exit(main())
