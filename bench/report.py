"""The result of a benchmark: rows, what they were measured on, and writing them down."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mobile_gguf.errors import MobileError
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import why

from .arm import Arm, ArmRun
from .geometry import ModelShape
from .plan import BenchOptions
from .simulate import accesses, simulate_min
from .sweep import SweepStep
from .table import Row, format_table, summarise
from .trace import Trace


@dataclass
class Report:
    """Everything a reader needs to judge the numbers and to repeat them."""

    command: str
    hardware: str
    trace: dict[str, Any]
    model: dict[str, Any]
    capped: bool
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    runs: dict[str, list[ArmRun]] = field(default_factory=dict)
    sweep: list[SweepStep] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: rows, raw runs and sweep included."""
        return asdict(self)

    def to_text(self) -> str:
        """The table with what it was measured on, in Markdown."""
        about = [f"- command: `{self.command}`", f"- machine: {self.hardware}"]
        about += [f"- routing: {self.trace['source']}", f"- model: {self.model['summary']}"]
        about += [f"- {note}" for note in self.notes]
        errors = [f"- {row.label} failed: {error}" for row in self.rows for error in row.errors]
        return "\n".join([format_table(self.rows), "", *about, *errors])


def make_rows(
    arms: list[Arm], runs: dict[str, list[ArmRun]], trace: Trace, shape: ModelShape, little_k: int,
    n_tokens: int,
) -> list[Row]:  # fmt: skip
    """One row an arm: first those of stock, which the others are compared with."""
    resident_s: dict[tuple[str, str], float] = {}
    stock: dict[str, Row] = {}
    rows = {}
    # resident arms first, then stock: what the others refer to
    for arm in sorted(arms, key=lambda arm: (not arm.resident, arm.system != "stock", arm.mode)):
        k = little_k if arm.mode == "little" else trace.k
        minimum = None
        if arm.system == "engine" and not arm.resident:
            asked = accesses(trace, k, prompt_k=trace.k, n_decode=n_tokens)
            minimum = simulate_min(asked, arm.budget_bytes // shape.expert_bytes) / n_tokens
        reference = stock.get(arm.budget)
        row = summarise(
            arm,
            runs.get(arm.label, []),
            n_prompt=trace.n_prompt,
            resident_s_per_token=resident_s.get((arm.system, arm.mode)),
            misses_min=minimum,
            stock_tokens_per_s=reference.tokens_per_s if reference else None,
            stock_is_upper_bound=reference.is_upper_bound if reference else False,
        )
        if arm.resident and row.tokens_per_s and not row.is_upper_bound:
            resident_s[arm.system, arm.mode] = 1 / row.tokens_per_s
        if arm.system == "stock" and arm.mode == "exact":
            stock[arm.budget] = row
        rows[arm.label] = row
    return [rows[arm.label] for arm in arms]


def describe_model(shape: ModelShape) -> str:
    """One line on the model's dimensions and bytes."""
    return (
        f"qwen3moe, {shape.n_layer} layers x {shape.n_expert} experts, top-{shape.k}, hidden {shape.n_embd}, "
        f"expert {shape.n_ff}, Q4_0, {format_bytes(shape.expert_bytes)} an expert, "
        f"{format_bytes(shape.all_expert_bytes)} of experts, {format_bytes(shape.dense_bytes)} dense"
    )


def doubts(report: Report, file_bytes: int, n_cpus: int) -> list[str]:
    """What a reader should hold against the numbers: a busy machine, a cache that was not empty."""
    runs = [run for some in report.runs.values() for run in some]
    notes = []
    loads = [run.load_average for run in runs if run.load_average is not None]
    if loads and max(loads) > n_cpus + 1:
        notes.append(
            f"the machine was busy with other work: load average up to {max(loads):.1f} on {n_cpus} cores"
        )
    for label, some in report.runs.items():
        if any(run.follows is False for run in some):
            notes.append(f"what {label} decoded is not known: it did not print the trace's text")
    cached = max((run.cached_bytes_before or 0 for run in runs), default=0)
    if cached > file_bytes / 100:
        notes.append(f"up to {format_bytes(cached)} of the model stayed in the page cache before a run")
    return notes


def how_measured(options: BenchOptions, report: Report) -> str:
    """One line on the method; docs/measurements.md has the rest."""
    slack = format_bytes(options.slack_bytes)
    cap = f"hard cap per process: budget + {slack}" if report.capped else "no cap"
    return (
        f"{options.tokens} tokens decoded after {report.trace['n_prompt']} of prompt, rounds: "
        f"{options.repeats}, arms interleaved, page cache dropped before each, {cap}; "
        "limit = missed bytes / disk bandwidth + time with everything resident"
    )


class Written(Protocol):
    """What can be written down."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        ...

    def to_text(self) -> str:
        """Markdown."""
        ...


def write_report(report: Written, out: Path) -> list[Path]:
    """Write OUT.json and OUT.md beside each other; returns both paths. Raises MobileError."""
    stem = out.with_suffix("") if out.suffix in (".json", ".md") else out
    paths = [stem.with_name(stem.name + suffix) for suffix in (".json", ".md")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        paths[1].write_text(report.to_text() + "\n", encoding="utf-8")
    except OSError as error:
        raise MobileError(f"cannot write the results to {stem}: {why(error)}") from None
    return paths
