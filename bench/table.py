"""From runs to a table: medians, the byte limit, ratios to stock; and how it is printed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mobile_gguf.sizes import MIB
from mobile_gguf.wording import markdown_table

from .arm import Arm, ArmRun


@dataclass(frozen=True)
class Row:
    """One arm over its runs. Medians; per decoded token where not said otherwise; None where unknown."""

    label: str
    system: str
    mode: str
    budget: str
    settings: str
    n_runs: int
    n_tokens: int  # of the shortest run
    tokens_per_s: float | None
    tokens_per_s_low: float | None
    tokens_per_s_high: float | None
    is_upper_bound: bool  # a run was stopped: tokens_per_s is more than was reached
    limit_s: float | None
    ratio_to_stock: float | None
    ratio_is_lower_bound: bool
    percent_of_limit: float | None
    bytes_read: float | None
    hits: float | None
    misses: float | None
    misses_min: float | None  # Belady's bound for this budget
    stall_share: float | None
    cpu_share: float | None  # of one processor's time
    bandwidth: float | None  # bytes/s
    prompt_tokens_per_s: float | None
    peak_bytes: int | None
    capped: bool
    errors: tuple[str, ...]


def missed_bytes(run: ArmRun) -> float:
    """Bytes per token that had to come from the disk: misses, and prefetches that were of use."""
    if not run.n_tokens:
        return 0.0
    counters = run.counters
    if counters is None:
        return (run.read_bytes or 0) / run.n_tokens
    useful = 0.0
    if counters["n_prefetched"]:
        prefetched_bytes = counters["bytes_read"] - counters["bytes_read_demand"]
        useful = prefetched_bytes * counters["n_prefetch_hits"] / counters["n_prefetched"]
    return (counters["bytes_read_demand"] + useful) / run.n_tokens


def percent_of_limit(run: ArmRun, resident_s_per_token: float) -> float | None:
    """The byte limit against the time taken: 100 means nothing but disk and resident compute, in turn.

    The limit is missed bytes / bandwidth + the time per token with everything resident; reading ahead
    while computing can go past it.
    """
    if not run.n_tokens or not run.seconds or not run.bandwidth:
        return None
    limit_s = missed_bytes(run) / run.bandwidth + resident_s_per_token
    return 100 * limit_s / (run.seconds / run.n_tokens)


def summarise(
    arm: Arm,
    runs: Sequence[ArmRun],
    *,
    n_prompt: int,
    resident_s_per_token: float | None,
    misses_min: float | None,
    stock_tokens_per_s: float | None,
    stock_is_upper_bound: bool,
) -> Row:
    """One row. Runs that failed are counted in ``errors`` and left out of the numbers."""
    good = [run for run in runs if not run.error]
    timed = [run for run in good if run.n_tokens]
    rates = [rate for rate in (run.tokens_per_s for run in good) if rate is not None]
    stopped = [run for run in good if run.limit_s is not None]
    rate = _median(rates)
    with_counters = [(run, run.counters) for run in timed if run.counters is not None]
    percents: list[float | None] = []
    if resident_s_per_token is not None and not arm.resident:
        percents = [percent_of_limit(run, resident_s_per_token) for run in timed]
    return Row(
        label=arm.label,
        system=arm.system,
        mode=arm.mode,
        budget=arm.budget,
        settings=arm.settings,
        n_runs=len(runs),
        n_tokens=min((run.n_tokens for run in good), default=0),
        tokens_per_s=rate,
        tokens_per_s_low=min(rates, default=None),
        tokens_per_s_high=max(rates, default=None),
        is_upper_bound=bool(stopped),
        limit_s=stopped[0].limit_s if stopped else None,
        ratio_to_stock=rate / stock_tokens_per_s if rate and stock_tokens_per_s else None,
        ratio_is_lower_bound=stock_is_upper_bound,
        percent_of_limit=_median(percents),
        bytes_read=_median([_bytes_read(run) for run in timed]),
        hits=_median([counters["n_hits"] / run.n_tokens for run, counters in with_counters]),
        misses=_median([counters["n_misses"] / run.n_tokens for run, counters in with_counters]),
        misses_min=misses_min,
        stall_share=_median([counters["stall_us"] / 1e6 / run.seconds for run, counters in with_counters]),
        cpu_share=_median([run.cpu_s / run.seconds for run in timed if run.cpu_s is not None]),
        bandwidth=_median([run.bandwidth for run in good if run.bandwidth]),
        prompt_tokens_per_s=_median([n_prompt / run.prompt_s for run in good if run.prompt_s and n_prompt]),
        peak_bytes=max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        capped=all(run.capped for run in runs),
        errors=tuple(dict.fromkeys(run.error for run in runs if run.error)),
    )


def _bytes_read(run: ArmRun) -> float | None:
    n_bytes = run.read_bytes if run.counters is None else run.counters["bytes_read"]
    return n_bytes / run.n_tokens if n_bytes is not None else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


HEADINGS = (
    "arm", "tokens/s", "spread", "x stock", "% of limit", "MiB/token", "hits", "misses", "MIN",
    "stall", "CPU", "disk MB/s", "prompt t/s", "settings",
)  # fmt: skip


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table, aligned to be read as it is; counts are per token, ``stall`` and ``CPU`` are
    shares of the time (CPU of one processor)."""
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    return "\n".join(markdown_table(cells, left=(0, len(HEADINGS) - 1)))


def _cells(row: Row) -> list[str]:
    rate = _number(row.tokens_per_s, 3)
    if row.tokens_per_s is None:
        rate = "failed"
    elif row.is_upper_bound:
        rate = f"< {rate} (stopped: {row.n_tokens} tokens, {row.limit_s:g} s)"
    ratio = _number(row.ratio_to_stock, 3)
    if row.ratio_to_stock is not None and row.ratio_is_lower_bound:
        # bound over bound says nothing
        ratio = "-" if row.is_upper_bound else f"> {ratio}"
    spread = "-"
    if row.tokens_per_s_low is not None and row.n_runs > 1:
        spread = f"{_number(row.tokens_per_s_low, 3)}-{_number(row.tokens_per_s_high, 3)}"
    return [
        row.label,
        rate,
        spread,
        ratio,
        _number(row.percent_of_limit, 3),
        _number(None if row.bytes_read is None else row.bytes_read / MIB, 3),
        _number(row.hits, 3),
        _number(row.misses, 3),
        _number(row.misses_min, 3),
        _percent(row.stall_share),
        _percent(row.cpu_share),
        _number(None if row.bandwidth is None else row.bandwidth / 1e6, 3),
        _number(row.prompt_tokens_per_s, 3),
        row.settings,
    ]


def _number(value: float | None, digits: int) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - whole)}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"
