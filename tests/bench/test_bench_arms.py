"""Planning, sweeping, following a child, the arithmetic of the table, and the verb."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mobile_gguf.bench import harness
from mobile_gguf.bench.arm import Arm, ArmRun, Runner, _follow, text_of
from mobile_gguf.bench.disk import cached_bytes, drop_page_cache, measure_bandwidth
from mobile_gguf.bench.geometry import ModelShape
from mobile_gguf.bench.hardware import describe_hardware
from mobile_gguf.bench.plan import BenchOptions, plan_arms
from mobile_gguf.bench.report import Report, doubts, make_rows, write_report
from mobile_gguf.bench.sweep import SweepChoices, default_threads, stock_load_modes, sweep
from mobile_gguf.bench.synthetic import synthesise_trace
from mobile_gguf.bench.table import HEADINGS, Row, format_table, missed_bytes, percent_of_limit, summarise
from mobile_gguf.cli import bench as bench_cli
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.sizes import GIB, MIB

SHAPE = ModelShape(n_layer=4, n_expert=16, k=2, n_embd=512, n_ff=32, n_vocab=40)
COUNTERS = {
    "n_hits": 60, "n_misses": 20, "n_prefetched": 0, "n_prefetch_hits": 0, "stall_us": 500_000,
    "bytes_read": 2000, "bytes_read_demand": 2000,
}  # fmt: skip
EXACT = Arm("engine", "exact", "25%", 1000, 2000)


def engine_run(**fields: Any) -> ArmRun:
    return ArmRun(
        n_tokens=10, seconds=2.0, prompt_s=4.0, cpu_s=1.0, counters=dict(COUNTERS), capped=True,
        bandwidth=1000.0, **fields,
    )  # fmt: skip


def row_of(arm: Arm, runs: list[ArmRun], **more: Any) -> Row:
    given: dict[str, Any] = {
        "n_prompt": 8, "resident_s_per_token": None, "misses_min": None,
        "stock_tokens_per_s": None, "stock_is_upper_bound": False,
    }  # fmt: skip
    return summarise(arm, runs, **{**given, **more})


def test_missed_bytes_are_demand_and_useful_prefetch() -> None:
    run = engine_run()
    assert missed_bytes(run) == 200
    assert run.counters is not None
    # half of what was read ahead was needed
    run.counters.update(bytes_read=3000, n_prefetched=10, n_prefetch_hits=5)
    assert missed_bytes(run) == 250
    assert missed_bytes(ArmRun(n_tokens=4, read_bytes=400)) == 100  # stock: what the kernel read
    assert missed_bytes(ArmRun()) == 0


def test_percent_of_limit() -> None:
    # 200 bytes at 1000/s and 0.05 s of compute, in 0.2 s
    assert percent_of_limit(engine_run(), 0.05) == pytest.approx(125)
    assert percent_of_limit(replace(engine_run(), bandwidth=4000.0), 0.05) == pytest.approx(50)
    assert percent_of_limit(replace(engine_run(), bandwidth=0.0), 0.05) is None
    assert percent_of_limit(ArmRun(), 0.05) is None


def test_rate_of_a_stopped_run_is_a_bound() -> None:
    assert engine_run().tokens_per_s == 5
    assert ArmRun(n_tokens=0, limit_s=20.0).tokens_per_s == 0.05
    assert ArmRun(n_tokens=3, seconds=15.0, limit_s=20.0).tokens_per_s == 0.2
    assert ArmRun().tokens_per_s is None


def test_row_is_the_median_of_good_runs() -> None:
    runs = [engine_run(), replace(engine_run(), seconds=1.0), replace(engine_run(), seconds=5.0)]
    runs.append(ArmRun(error="killed", capped=True, peak_bytes=7))
    row = row_of(EXACT, runs, resident_s_per_token=0.05, misses_min=1.5, stock_tokens_per_s=0.5)
    assert (row.tokens_per_s, row.tokens_per_s_low, row.tokens_per_s_high) == (5, 2, 10)
    assert (row.ratio_to_stock, row.percent_of_limit) == (10, pytest.approx(125))
    assert (row.bytes_read, row.hits, row.misses, row.misses_min) == (200, 6, 2, 1.5)
    assert (row.stall_share, row.cpu_share, row.prompt_tokens_per_s) == (0.25, 0.5, 2)
    assert (row.n_runs, row.errors, row.peak_bytes, row.capped) == (4, ("killed",), 7, True)


def test_resident_rows_have_no_disk_limit() -> None:
    assert (
        row_of(EXACT.tuned(resident=True), [engine_run()], resident_s_per_token=0.1).percent_of_limit is None
    )


def cells(row: Row) -> dict[str, str]:
    line = format_table([row]).splitlines()[2]
    return dict(zip(HEADINGS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))


def test_table_says_what_is_a_bound_and_what_failed() -> None:
    stopped = row_of(Arm("stock", "exact", "12%", 1, 2), [ArmRun(n_tokens=4, seconds=90.0, limit_s=100.0)])
    assert cells(stopped)["tokens/s"] == "< 0.050 (stopped: 4 tokens, 100 s)"
    ours = row_of(EXACT, [engine_run()], stock_tokens_per_s=0.05, stock_is_upper_bound=True)
    shown = cells(ours)
    assert (shown["arm"], shown["tokens/s"], shown["x stock"]) == ("engine exact 25%", "5.00", "> 100")
    assert (shown["hits"], shown["stall"], shown["CPU"], shown["settings"]) == (
        "6.00",
        "25%",
        "50%",
        "t=1 io=4",
    )
    failed = row_of(EXACT, [ArmRun(error="killed")])
    assert cells(failed)["tokens/s"] == "failed"
    both = row_of(
        EXACT,
        [ArmRun(n_tokens=1, seconds=1.0, limit_s=5.0)],
        stock_tokens_per_s=0.05,
        stock_is_upper_bound=True,
    )
    assert cells(both)["x stock"] == "-"


def test_table_is_aligned() -> None:
    lines = format_table([row_of(EXACT, [engine_run()]), row_of(EXACT, [])]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def options(**fields: Any) -> BenchOptions:
    return BenchOptions(slack_bytes=100, **fields)


def test_arms_of_a_round() -> None:
    given = options(budgets=("25%", "100%"), versus=("stock", "stock-little"), evictions=("decay", "moepic"))
    arms, notes = plan_arms(given, SHAPE, available_bytes=GIB)
    assert [arm.label for arm in arms] == [
        "stock exact 25%", "stock little 25%", "engine exact 25%", "engine exact moepic 25%",
        "engine little 25%", "engine little moepic 25%",
        "stock exact 100%", "stock little 100%", "engine exact 100%", "engine little 100%",
    ]  # fmt: skip
    assert notes == []
    assert arms[0].budget_bytes == SHAPE.all_expert_bytes // 4
    assert arms[0].cap_bytes == arms[0].budget_bytes + 100
    assert [arm.resident for arm in arms] == [False] * 6 + [True] * 4


def test_resident_arms_are_added_or_left_out_aloud() -> None:
    arms, notes = plan_arms(options(budgets=("25%",)), SHAPE, available_bytes=GIB)
    assert arms[-1].resident
    assert notes[0].startswith("100% was added")
    both = options(budgets=("25%", "100%"))
    arms, notes = plan_arms(both, SHAPE, available_bytes=SHAPE.all_expert_bytes)
    assert {arm.budget for arm in arms} == {"25%"}
    assert notes[0].startswith("100% was left out: it needs")
    with pytest.raises(UsageError, match="nothing to run"):
        plan_arms(options(budgets=("100%",)), SHAPE, available_bytes=10)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("auto", "a benchmark needs sizes"),
        ("1%", "less than one layer's experts"),
        ("4096", "less than one layer's experts"),
        ("much", "is not a size"),
    ],
)
def test_budgets_that_cannot_work(budget: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan_arms(options(budgets=(budget,)), SHAPE, available_bytes=GIB)


def fake_runs(rates: dict[str, float], seen: list[str]) -> Callable[[Arm], ArmRun]:
    def run(arm: Arm) -> ArmRun:
        seen.append(arm.settings)
        rate = rates.get(arm.settings, 1.0)
        return ArmRun(n_tokens=8, seconds=8 / rate) if rate else ArmRun(error="does not fit")

    return run


def test_sweep_goes_one_setting_after_the_other() -> None:
    seen: list[str] = []
    rates = {"t=2 io=4": 3.0, "t=2 io=4 repack": 2.0, "t=2 io=8": 5.0, "t=2 io=2": 0.0}
    best, steps = sweep(EXACT, SweepChoices((1, 2), (2, 4, 8)), 10**9, fake_runs(rates, seen))
    assert (best.threads, best.io_threads, best.repack) == (2, 8, False)
    assert seen == ["t=2 io=4", "t=1 io=4", "t=2 io=4 repack", "t=2 io=2", "t=2 io=8"]
    assert [step.why for step in steps if step.tokens_per_s is None] == ["does not fit"]


def test_stock_sweep_tries_the_load_modes_that_fit() -> None:
    capped = Arm("stock", "exact", "12%", 100, 1000)
    assert stock_load_modes(capped, 1001)[0] == [("mmap", False)]
    assert "only mmap can run" in stock_load_modes(capped, 1001)[1]
    assert stock_load_modes(capped, 1000)[1] == ""
    seen: list[str] = []
    rates = {"t=1 mmap": 4.0, "t=1 no-mmap repack": 6.0}
    best, _ = sweep(capped, SweepChoices((1, 2), (4,)), 1000, fake_runs(rates, seen))
    assert best.settings == "t=1 no-mmap repack"
    assert seen == ["t=2 mmap", "t=1 mmap", "t=1 no-mmap", "t=1 no-mmap repack", "t=1 direct-io"]


def test_thread_counts_to_try() -> None:
    assert [default_threads(n) for n in (1, 2, 16)] == [(1,), (1, 2), (1, 8, 16)]


def event(kind: str, **fields: Any) -> str:
    return json.dumps({"event": kind, **fields}) + "\n"


def token(seconds: float) -> str:
    return event("token", seconds=seconds, cpu_s=0.5, read_bytes=9, major_faults=1, counters=None)


def test_events_of_a_whole_run() -> None:
    run = ArmRun()
    text = event("loaded", seconds=1.5) + event("prompt", seconds=2.5) + token(0.5) + token(0.9)
    assert _follow(StringIO(text + event("done", ids=None, worth=None, warm=None)), 60, 60, run)
    assert (run.load_s, run.prompt_s, run.n_tokens, run.seconds, run.read_bytes) == (1.5, 2.5, 2, 0.9, 9)
    assert run.limit_s is None


def test_events_of_runs_that_end_early() -> None:
    run = ArmRun()
    assert not _follow(StringIO(event("error", message="no such file")), 60, 60, run)
    assert run.error == "no such file"
    run = ArmRun()
    assert not _follow(StringIO(event("loaded", seconds=1.0)), 60, 60, run)
    assert (run.error, run.limit_s) == ("", None)


def test_a_silent_run_is_stopped_at_its_limits() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdout, os.fdopen(writing, "w") as child:
        child.write(event("prompt", seconds=1.0))
        child.flush()
        run = ArmRun()
        assert not _follow(stdout, 60, 0, run)
        assert (run.limit_s, run.n_tokens, run.error) == (0, 0, "")
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdout, os.fdopen(writing, "w"):
        run = ArmRun()
        assert not _follow(stdout, 0, 60, run)
        assert run.error == "the prompt was not done after 0 s"


def test_what_a_child_is_asked_for_is_the_text_and_what_the_arm_says(tmp_path: Path) -> None:
    trace = synthesise_trace(n_layer=1, n_expert=4, k=1, n_prompt=2, n_decode=3)
    runner = Runner(tmp_path / "none.gguf", text_of(trace), {"engine": None}, little_k=1)
    arm = Arm("engine", "exact", "50%", GIB, 2 * GIB)
    job = runner._job(arm, 2, ids=False)
    assert (job.prompt, job.decode, job.ids, job.n_ubatch) == ([0, 1], [2, 3], False, 512)
    long = runner._job(arm.tuned(prompt_tokens=12, n_ubatch=1024), 0, ids=True)
    assert (long.prompt, long.decode, long.ids) == ([0, 1, 2, 3, 4] * 2 + [0, 1], [], True)
    assert long.n_ubatch == 1024


def test_a_child_that_cannot_load_is_an_error_of_its_arm(tmp_path: Path) -> None:
    trace = synthesise_trace(n_layer=1, n_expert=4, k=1, n_prompt=1, n_decode=2)
    runner = Runner(tmp_path / "none.gguf", text_of(trace), {"stock": tmp_path}, little_k=1)
    result = runner.run(Arm("stock", "exact", "100%", GIB, 2 * GIB), 1, 600)
    # no library in that directory, or no llama-cpp-python at all
    assert "llama-cpp-python" in result.error
    assert result.n_tokens == 0


def test_bandwidth_is_measured_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * MIB))
    measured = measure_bandwidth(path, 5000, n_threads=2, seconds=0)
    assert (measured.block_bytes, measured.n_threads) == (8192, 2)
    assert measured.bytes_per_s > 0
    with pytest.raises(MobileError, match="smaller than one block"):
        measure_bandwidth(path, 4 * MIB)


def test_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    if cached_bytes(path) is None:
        pytest.skip("this system does not say what it caches")
    assert cached_bytes(path) == MIB
    # a file system in memory keeps everything, a disk nothing but what the kernel just holds
    left = drop_page_cache(path)
    assert left is not None
    assert 0 <= left <= MIB


def test_hardware_is_one_line(tmp_path: Path) -> None:
    line = describe_hardware(tmp_path)
    assert "cores" in line
    assert "\n" not in line


def report_of(arms: list[Arm], runs: dict[str, list[ArmRun]]) -> Report:
    trace = synthesise_trace(n_layer=4, n_expert=16, k=2, n_prompt=8, n_decode=10)
    report = Report("mobile-gguf bench", "a machine", {"source": "made up"}, {"summary": "tiny"}, True, {})
    report.runs = runs
    report.rows = make_rows(arms, runs, trace, SHAPE, 1, 10)
    return report


def test_rows_refer_to_stock_and_to_the_resident_time(tmp_path: Path) -> None:
    arms, _ = plan_arms(options(budgets=("25%", "100%")), SHAPE, available_bytes=GIB)
    runs = {arm.label: [engine_run()] for arm in arms}
    runs["stock exact 25%"] = [ArmRun(n_tokens=0, limit_s=20.0)]
    runs["engine exact 100%"] = [replace(engine_run(), seconds=0.5)]
    report = report_of(arms, runs)
    rows = {row.label: row for row in report.rows}
    assert list(rows) == [arm.label for arm in arms]
    # 200 missed bytes at 1000/s and 0.05 s resident, against 0.2 s
    assert rows["engine exact 25%"].percent_of_limit == pytest.approx(125)
    assert rows["engine little 25%"].percent_of_limit == pytest.approx(200)
    assert rows["engine exact 25%"].ratio_to_stock == pytest.approx(100)
    assert rows["engine exact 25%"].ratio_is_lower_bound
    assert rows["engine exact 100%"].ratio_to_stock == pytest.approx(4)
    exact, little = rows["engine exact 25%"].misses_min, rows["engine little 25%"].misses_min
    assert exact is not None
    assert little is not None
    assert 0 < little < exact < SHAPE.n_layer * SHAPE.k
    written = write_report(report, tmp_path / "new" / "result.json")
    assert [path.name for path in written] == ["result.json", "result.md"]
    assert json.loads(written[0].read_text())["rows"][0]["label"] == "stock exact 25%"
    assert "| stock exact 25% " in written[1].read_text()


def test_busy_machines_and_warm_caches_are_said() -> None:
    report = report_of([EXACT], {EXACT.label: [engine_run(load_average=7.5, cached_bytes_before=50 * MIB)]})
    assert doubts(report, GIB, 2) == [
        "the machine was busy with other work: load average up to 7.5 on 2 cores",
        "up to 50.0 MiB of the model stayed in the page cache before a run",
    ]
    quiet = report_of([EXACT], {EXACT.label: [engine_run(load_average=2.0, cached_bytes_before=0)]})
    assert doubts(quiet, GIB, 2) == []


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="mobile-gguf")
    bench_cli.register(parser.add_subparsers())
    args = parser.parse_args(["bench", *arguments])
    return args.func(args)


def test_simulation_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "two.csv"
    rows = [f"0,{step > 0:d},{step},0,0,{step % 2},1,0,0" for step in range(5)]
    trace.write_text("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n" + "\n".join(rows))
    assert bench("--simulate", "--trace", str(trace), "--budget", "50%,100%") == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| budget | k | lru | moepic | decay | two-rate | MIN |",
        "|---|---|---|---|---|---|---|",
        # expert 0 in the prompt, then 1 0 1 0; MIN keeps one of them
        "| 50% | 1 | 1.00 | 1.00 | 1.00 | 1.00 | 0.50 |",
        "| 50% | 1 | 1.00 | 1.00 | 1.00 | 1.00 | 0.50 |",
        "| 100% | 1 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |",
        "| 100% | 1 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |",
    ]
    assert bench("--simulate", "--trace", str(trace), "--budget", "50%", "--json") == 0
    assert json.loads(capsys.readouterr().out)["traces"][0]["rows"][0]["misses"]["MIN"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modes", "huge"], "--modes 'huge': choose from exact, little"),
        (["--vs", "ollama"], "--vs 'ollama': choose from stock, stock-little, none"),
        (["--budget", ","], "--budget is empty"),
        (["--size", "50%"], "--size '50%' is not a number of bytes"),
        (["--threads", "0"], "--threads '0' is not a list of numbers"),
        (["--simulate", "--budget", "1GiB"], "takes budgets as shares"),
        (["--trace", "a", "--trace", "b"], "only --simulate takes more than one"),
        (["--tokens", "500"], "--tokens 500: the trace"),
        (["--size", "1MiB"], "ask for at least"),
    ],
)
def test_usage_errors(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        bench(*arguments)
    assert says in str(caught.value)


def test_missing_libraries_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory with a llama library"):
        harness.find_libraries(BenchOptions(stock_lib=tmp_path / "none"), {"stock"})
