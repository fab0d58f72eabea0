"""What ``mobile-gguf plan`` foresees against what comes: python -m mobile_gguf.bench.plan_accuracy --trace
FILE

Every group of configurations (a model, a number of threads) is measured anew just before it runs, rounds are
interleaved, and nothing that a run taught is used, but for the column that says so. Writes OUT.json and
OUT.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mobile_gguf.decode import BIG_LITTLE
from mobile_gguf.gguf_info import GgufInfo, read_gguf_info
from mobile_gguf.memory import read_memory
from mobile_gguf.options import LoadOptions
from mobile_gguf.plan.disk import disk_name
from mobile_gguf.plan.fit import plan_fit
from mobile_gguf.plan.learning import Lesson, correct, improved
from mobile_gguf.plan.machine import Measurements, identify_machine
from mobile_gguf.plan.measure import measure, steps_for
from mobile_gguf.plan.planner import asked_of
from mobile_gguf.plan.predict import predict
from mobile_gguf.plan.prediction import Prediction
from mobile_gguf.plan.settings import make_settings
from mobile_gguf.plan.workload import read_workload
from mobile_gguf.resolve import resolve_model

from .arm import Arm, Runner
from .disk import drop_page_cache
from .hardware import describe_hardware
from .trace import Trace, read_trace

PROMPT = "The history of the city begins long before the first written records, and"
N_TOKENS = 48
SLACK = 700 << 20


@dataclass(frozen=True)
class Case:
    """One configuration."""

    model: str  # "demo" or "replay"
    mode: str
    budget: str
    threads: int


@dataclass
class Result:
    """A case's runs: predicted and actual tokens per second, one each per round."""

    case: Case
    predicted: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    actual: list[float] = field(default_factory=list)
    learnt: list[float] = field(default_factory=list)  # as corrected by the rounds before
    loads: list[float] = field(default_factory=list)  # of the machine
    lesson: Lesson = field(default_factory=Lesson)

    @property
    def error(self) -> float:
        """Of the medians: predicted over actual, less one."""
        return statistics.median(self.predicted) / statistics.median(self.actual) - 1


CASES = [
    *(Case("demo", "exact", budget, 1) for budget in ("100%", "50%", "25%", "12%")),
    *(Case("demo", mode, budget, 1) for mode in ("little", "big-little") for budget in ("100%", "25%")),
    *(Case("demo", "exact", budget, 2) for budget in ("100%", "25%")),
    *(Case("replay", "exact", budget, 1) for budget in ("100%", "50%", "25%", "12%")),
    *(Case("replay", "little", budget, 1) for budget in ("100%", "25%", "12%")),
    *(Case("replay", "exact", budget, 2) for budget in ("25%",)),
]


def main() -> int:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="the routing that the replay model follows")
    parser.add_argument("--replay", type=Path, required=True, help="the model that `mobile-gguf bench` wrote")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    trace = read_trace(args.trace)
    results = {case: Result(case) for case in CASES}
    try:
        run_all(results, args.rounds, args.replay, trace)
    except KeyboardInterrupt:
        print("interrupted: what was finished is written", file=sys.stderr)
    finished = [one for one in results.values() if one.actual]
    if finished:
        write(args.out, finished, describe_hardware(args.replay))
    return 0


def run_all(results: dict[Case, Result], rounds: int, replay: Path, trace: Trace) -> None:
    """All cases, A B C A B C."""
    for number in range(rounds):
        for case in CASES:
            path = resolve_model("demo") if case.model == "demo" else replay
            info, result = read_gguf_info(path), results[case]
            before = measure_anew(info, case)
            actual, n_tokens, big_share = run(case, info, trace)
            # a machine with other work to do is another one a moment later: the mean of before and after
            pairs = [
                foresee(case, info, one, n_tokens, result.lesson)
                for one in (before, measure_anew(info, case))
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
            name = f"{case.model} {case.mode} {case.budget} t={case.threads}"
            text = f"{name}: {actual:.2f} tokens/s, predicted {plain.predicted_tps:.2f}"
            print(f"{text}, load {result.loads[-1]:.1f}", file=sys.stderr, flush=True)


def measure_anew(info: GgufInfo, case: Case) -> Measurements:
    """A measurement of what this case needs, kept nowhere but here."""
    known = Measurements(identify_machine())
    k, half = info.n_expert_used, max(1, info.n_expert_used // 2)
    ks = {"exact": [k], "little": [half], BIG_LITTLE: [k, half]}[case.mode]
    resident = case.budget == "100%"
    workload = read_workload(info)
    steps = steps_for(info, workload, ks, case.threads, resident=resident, stored=not resident)
    for problem in measure(known, steps):
        print(problem, file=sys.stderr)
    return known


def foresee(
    case: Case, info: GgufInfo, known: Measurements, n_tokens: int, lesson: Lesson
) -> tuple[Prediction, Prediction]:
    """The prediction without and with what earlier rounds taught."""
    options = LoadOptions(mode=case.mode, ram_budget=case.budget, threads=case.threads, n_ctx=512)
    fit = plan_fit(info, asked_of(info, options), read_memory())
    settings = make_settings(info, options, fit.ram_share, n_ctx=512, n_tokens=n_tokens)
    workload, disk = read_workload(info), disk_name(info.path)
    plain = predict(info, workload, known, settings, disk)
    if lesson.big_share is not None:
        settings = make_settings(
            info, options, fit.ram_share, n_ctx=512, n_tokens=n_tokens, learnt_share=lesson.big_share
        )
    taught = predict(info, workload, known, settings, disk)
    if plain is None or taught is None:
        raise SystemExit("the machine could not be measured")
    return plain, correct(taught, lesson)


def mean(predictions: Sequence[Prediction]) -> Prediction:
    """One prediction of several: geometric means."""
    columns = zip(*((one.predicted_tps, one.low, one.high) for one in predictions), strict=True)
    return Prediction(predictions[0].mode, *(statistics.geometric_mean(column) for column in columns))


def run(case: Case, info: GgufInfo, trace: Trace) -> tuple[float, int, float | None]:
    """Tokens per second, tokens, and the share of big ones."""
    if case.model == "replay":
        return run_replay(case, info, trace)
    from mobile_gguf import load

    drop_page_cache(info.path)
    with load("demo", mode=case.mode, ram_budget=case.budget, threads=case.threads, n_ctx=512) as model:
        reply = model.generate(PROMPT, max_tokens=N_TOKENS, seed=1)
    receipt, n_tokens = reply.receipt, reply.usage["completion_tokens"]
    big = receipt.tokens_big - 1 + receipt.tokens_fallback
    share = big / max(1, n_tokens - 1) if case.mode == BIG_LITTLE else None
    return reply.timings["predicted_per_second"], n_tokens, share


def run_replay(case: Case, info: GgufInfo, trace: Trace) -> tuple[float, int, None]:
    """The same for the model that replays a trace, in a process of its own."""
    options = LoadOptions(mode=case.mode, ram_budget=case.budget, threads=case.threads, n_ctx=512)
    budget = plan_fit(info, asked_of(info, options), read_memory()).ram_budget_bytes
    resident = case.budget == "100%"
    arm = Arm(
        system="engine", mode=case.mode, budget=case.budget, budget_bytes=0 if resident else budget,
        cap_bytes=budget + SLACK, resident=resident, threads=case.threads, repack=True,
    )  # fmt: skip
    drop_page_cache(info.path)
    runner = Runner(info.path, trace, {"engine": None}, little_k=info.n_expert_used // 2)
    result = runner.run(arm, N_TOKENS, 60.0)
    if result.error or not result.n_tokens:
        raise SystemExit(f"{case}: {result.error or 'no token came'}")
    return result.n_tokens / result.seconds, result.n_tokens, None


def write(out: Path, results: list[Result], hardware: str) -> None:
    """OUT.json and OUT.md."""
    median = statistics.median
    errors = [abs(one.error) for one in results]
    inside = sum(median(one.low) <= median(one.actual) <= median(one.high) for one in results)
    lines = [
        "| model | mode | budget | threads | predicted (band) | actual (spread) | error | error, learnt |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
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
            f"| {case.model} | {case.mode} | {case.budget} | {case.threads} "
            f"| {foreseen} | {came} | {one.error:+.0%} | {learnt} |"
        )
    loads = [load for one in results for load in one.loads]
    lines += [
        "",
        f"- median error {median(errors):.0%} over {len(results)} configurations, largest {max(errors):.0%}; "
        f"{inside} inside the band",
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


if __name__ == "__main__":
    sys.exit(main())
