"""What keeping leading segments of experts (MoEpic) moves and takes.

    python -m mobile_gguf.bench.split TRACE

For each budget: whole experts, so many of an expert's segments kept alike in all layers, and what the
configurator finds by layer. Without ``--model`` the trace is replayed through a cache that works as the
engine's, and times are what the configurator foresees for a layer that computes for ``--compute`` ms and
reads an expert in ``--load`` ms; ``--precision`` of the reads are known a layer ahead. With ``--model``, the
trace's replay model in segments (``mobile-gguf convert REPLAY.gguf --segments S``), all of it runs in turn,
round after round, each run in a process under its own memory cap. Times are foreseen by what this machine was
measured to take, set right by a run of whole experts before the others, as ``calibrate --plan`` does.
``--unsegmented`` is the replay model as it was, whose experts have three reads each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mobile_gguf.engine.split import Split
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.plan.speed import Pass, Reads
from mobile_gguf.plan.split import Choice, Costs, Outcome, as_measured, configure
from mobile_gguf.plan.split_cache import Shape
from mobile_gguf.plan.split_costs import choose_split, measured_costs
from mobile_gguf.sizes import MIB
from mobile_gguf.wording import markdown_table

from .arm import Arm, Runner, text_of
from .hardware import n_cpus
from .harness import find_libraries
from .plan import BenchOptions, budget_of
from .record import begin_record, keep_record
from .replay import median_range, record_run
from .trace import Trace, read_trace

_SLACK_BYTES = 900 * MIB
WHOLE, UNSEGMENTED = "whole", "unsegmented"


def outcomes(choice: Choice, n_segments: int) -> dict[str, Outcome]:
    """What was weighed, by name, whole experts first."""
    alike = {f"{one.kept[0]} of {n_segments}": one for one in choice.alike}
    return {WHOLE: choice.whole, **alike, "by layer": choice.by_layer}


def simulated(trace: Trace, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each budget, load and split."""
    shape = Shape(trace.n_layer, trace.n_expert, args.segments)
    rows = []
    for budget in args.budget.split(","):
        capacity = budget_of(budget, shape.n_parts * args.expert_bytes // args.segments)
        capacity //= max(1, args.expert_bytes // args.segments)
        for load_ms in map(float, args.load.split(",")):
            reads = Reads(1.0, 0.0, load_ms / 1e3, 1)
            one = Pass(trace.k, trace.n_layer, 0.0, args.compute / 1e3)
            costs = Costs(one, reads, args.precision, args.compute / 1e3)
            choice = configure(trace.experts, shape, capacity, args.expert_bytes, costs)
            rows += [
                {
                    "budget": budget, "load_ms": load_ms, "split": name,
                    "chosen": one is choice.chosen, **asdict(one),
                }
                for name, one in outcomes(choice, args.segments).items()
            ]  # fmt: skip
    return rows


def simulated_page(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows as a table; a star is what the configurator chooses."""
    cells = [
        (
            row["budget"], f"{row['load_ms']:g}", row["split"] + (" *" if row["chosen"] else ""),
            f"{row['n_bytes'] / MIB:.0f}", f"{1e3 * row['seconds']:.1f}",
            f"{min(row['kept'])}-{max(row['kept'])}",
        )
        for row in rows
    ]  # fmt: skip
    heads = ("budget", "ms an expert", "kept", "MiB/token", "ms/token", "segments kept")
    said = (
        f"{args.segments} segments, {args.compute:g} ms a layer, {args.precision:.0%} of reads known a layer "
        "ahead; * is chosen"
    )
    return "\n".join([said, "", *markdown_table([heads, *cells], left=(2,)), ""])


def measured(trace: Trace, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was foreseen, and all runs in the order in which they were made."""
    info = read_gguf_info(args.model)
    if info.segments == 1:
        raise UsageError(f"{args.model} holds its experts whole: `mobile-gguf convert --segments` it first")
    costs, eviction = measured_costs(info, args.threads)
    runner = Runner(args.model, text_of(trace), find_libraries(BenchOptions(versus=()), {"engine"}), 1)
    foreseen: list[dict[str, Any]] = []
    for budget in args.budget.split(","):
        n_bytes = budget_of(budget, info.expert_bytes)
        choice = choose_split(info, trace.experts, n_bytes, costs, eviction)
        first = runner.run(_arm(budget, n_bytes, None, args), args.tokens, args.limit)
        if first.tokens_per_s:
            choice = as_measured(choice, 1 / first.tokens_per_s)
        foreseen += [
            {
                "budget": budget, "budget_bytes": n_bytes, "split": name, "chosen": one is choice.chosen,
                **asdict(one),
            }
            for name, one in outcomes(choice, info.segments).items()
        ]  # fmt: skip
    return foreseen, _run_all(runner, info, foreseen, args)


def _run_all(
    runner: Runner, info: GgufInfo, foreseen: Sequence[dict[str, Any]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    rows = [*foreseen]
    if args.unsegmented is not None:
        rows += [row | {"split": UNSEGMENTED} for row in foreseen if row["split"] == WHOLE]
    for number in range(args.rounds):
        for row in rows[:: 1 if number % 2 == 0 else -1]:
            split = None if row["split"] in (WHOLE, UNSEGMENTED) else _in_model(info, row)
            model = args.unsegmented if row["split"] == UNSEGMENTED else args.model
            arm = _arm(row["budget"], row["budget_bytes"], split, args)
            run = replace(runner, model=model).run(arm, args.tokens, args.limit)
            record_run(runs, run, run.tokens_per_s, round=number, budget=row["budget"], split=row["split"])
    return runs


def _arm(budget: str, n_bytes: int, split: Split | None, args: argparse.Namespace) -> Arm:
    return Arm("engine", "exact", budget, n_bytes, n_bytes + _SLACK_BYTES, threads=args.threads, split=split)


def _in_model(info: GgufInfo, row: dict[str, Any]) -> Split:
    """A split of the layers with experts as one of all layers."""
    kept, shares = [info.segments] * info.n_layer, [0.0] * info.n_layer
    for layer, n, share in zip(info.moe_layers, row["kept"], row["shares"], strict=True):
        kept[layer], shares[layer] = n, share
    return Split(tuple(kept), tuple(shares))


def measured_page(
    foreseen: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], args: argparse.Namespace
) -> str:
    """A row for each budget and split: times, ratios to whole experts of the same round, bytes."""
    heads = (
        "budget",
        "kept",
        "ms/token",
        "foreseen",
        "time / whole",
        "MiB/token",
        "foreseen ",
        "segments kept",
    )
    cells = []
    others = [run for run in runs if run["split"] == UNSEGMENTED]
    rows = [
        row | {"split": UNSEGMENTED, "chosen": False} for row in foreseen if others and row["split"] == WHOLE
    ]
    for row in (*foreseen, *rows):
        own = _of(runs, row)
        whole = {run["round"]: run for run in runs if _is(run, row["budget"], WHOLE)}
        ms = [1e3 / run["tokens_per_s"] for run in own]
        ratios = [
            whole[run["round"]]["tokens_per_s"] / run["tokens_per_s"] for run in own if run["round"] in whole
        ]
        read = [run["run"]["counters"]["bytes_read"] / run["run"]["n_tokens"] / MIB for run in own]
        cells.append(
            (
                row["budget"], row["split"] + (" *" if row["chosen"] else ""), median_range(ms),
                f"{1e3 * row['seconds']:.1f}", median_range(ratios, 2),
                f"{statistics.median(read):.1f}" if read else "failed", f"{row['n_bytes'] / MIB:.1f}",
                f"{min(row['kept'])}-{max(row['kept'])}",
            )
        )  # fmt: skip
    said = (
        f"{args.model.name}, {args.tokens} tokens after the prompt, {args.rounds} interleaved rounds, "
        f"{args.threads} threads; median (range); * is chosen"
    )
    return "\n".join([said, "", *markdown_table([heads, *cells], left=(1,)), ""])


def _is(run: dict[str, Any], budget: str, split: str) -> bool:
    return run["budget"] == budget and run["split"] == split and bool(run["tokens_per_s"])


def _of(runs: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in runs if _is(run, row["budget"], row["split"])]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.split", description=__doc__)
    parser.add_argument("trace", type=Path, help="a route trace, such as qwen.route.csv.gz")
    parser.add_argument("--budget", default="12.5%,25%,50%")
    parser.add_argument("--model", type=Path, help="the trace's replay model in segments: measure")
    parser.add_argument("--unsegmented", type=Path, help="the same model, its experts in one piece")
    parser.add_argument("--segments", type=int, default=8, help="without a model: of an expert")
    parser.add_argument("--expert-bytes", type=int, default=2654208, help="without a model (Qwen3-30B-A3B's)")
    parser.add_argument("--compute", type=float, default=0.5, help="without a model: ms of a layer's experts")
    parser.add_argument("--load", default="0.1,0.5,2", help="without a model: ms of an expert's read")
    parser.add_argument("--precision", type=float, default=0.0, help="of predictions a layer ahead, 0 to 1")
    parser.add_argument("--threads", "-t", type=int, default=n_cpus())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of decoding in one run")
    parser.add_argument("--out", type=Path, help="folder for split.json and split.md")
    args = parser.parse_args(argv)
    record = begin_record("split", argv)
    try:
        trace = read_trace(args.trace)
        if args.model is None:
            rows = simulated(trace, args)
            record["rows"], page = rows, simulated_page(rows, args)
        else:
            foreseen, runs = measured(trace, args)
            record |= {"foreseen": foreseen, "runs": runs}
            page = measured_page(foreseen, runs, args)
    except MobileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page)
    keep_record(args.out, "split", record, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
