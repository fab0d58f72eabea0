"""``mobile-gguf bench``: the engine against stock llama.cpp, replaying real routing under memory caps."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mobile_gguf.errors import UsageError
from mobile_gguf.files.plots import check_plot
from mobile_gguf.flags import OUT_FLAGS, at_least_one
from mobile_gguf.options.words import DEFAULT_EVICTION, EVICTION, EXACT, LITTLE
from mobile_gguf.sizes import parse_size

# a replay follows its trace, so there is no telling which of its tokens are important
MODES = (EXACT, LITTLE)
VERSUS = ("stock", "stock-little", "none")

_DESCRIPTION = """Measure decoding speed against stock llama.cpp. A model of random weights that follows a
recorded routing trace is written to the cache directory (once; it needs --size of disk), and every arm
replays it in a process of its own under a hard memory cap (budget + slack), page cache dropped, settings
swept, runs interleaved, with the disk measured beside each run. A run takes minutes; stderr says how far
it is."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "bench", help="measure speed against stock llama.cpp", description=_DESCRIPTION, allow_abbrev=False
    )

    def add(*flags: str, help: str, **more: Any) -> None:
        shown = more.get("default")
        if shown is not None:
            help += f" (default: {shown})".replace("%", "%%")
        parser.add_argument(*flags, help=help, **more)

    add(
        "--trace",
        metavar="FILE",
        type=Path,
        action="append",
        help="routing trace, .csv or .csv.gz; without one a made-up routing is used, and said so",
    )
    add(
        "--budget",
        metavar="LIST",
        help="expert budgets, as shares or sizes (default: 12%%,25%%,100%%; of a scoreboard 12%%,25%%,50%%)",
    )
    add("--modes", metavar="LIST", default=",".join(MODES), help="modes of the engine")
    add("--vs", metavar="LIST", default="stock", help="stock, stock-little (half the experts) or none")
    add(
        "--vs-command",
        metavar="COMMAND",
        action="append",
        help="another engine's command, run under the same cap on the same file: {model}, {prompt}, "
        "{tokens}, {threads}, {budget_mib}, {budget_bytes}, {cap_bytes} are filled in; may be given more "
        "than once",
    )
    add(
        "--vs-pattern",
        metavar="REGEX",
        help="where such a command prints its tokens/s: the first group, or the groups named decode and "
        "prompt (default: the lines of llama.cpp's commands)",
    )
    add(
        "--write-model",
        metavar="FILE",
        type=Path,
        help="only write the model that follows the trace to FILE, and print its prompt: any engine runs it",
    )
    add(
        "--right",
        metavar="SHARE",
        type=float,
        default=1.0,
        help="of a model that is written: how often the likeliest token is the trace's next (default: 1)",
    )
    add("--eviction", metavar="LIST", default=DEFAULT_EVICTION, help="eviction policies of the engine")
    add("--size", metavar="SIZE", default="4GiB", help="expert bytes of the model")
    add(
        "--tokens",
        metavar="N",
        type=at_least_one,
        help="decoded tokens a run (default: 32); of a scoreboard's text (default: 1024)",
    )
    add("--repeats", metavar="N", type=at_least_one, default=3, help="rounds over all arms")
    add("--slack", metavar="SIZE", default="700MiB", help="memory a process gets beside its budget")
    add("--arm-seconds", metavar="S", type=at_least_one, default=300, help="stop decoding after so long")
    add("-t", "--threads", metavar="LIST", help="thread counts to try (default: 1, half, all)")
    add("--io-threads", metavar="LIST", default="2,4,8", help="I/O thread counts to try")
    add("--engine-lib", metavar="DIR", type=Path, help="the engine's libraries (default: installed)")
    add("--stock-lib", metavar="DIR", type=Path, help="stock libraries (default: `engine build --stock`)")
    add(
        "--scoreboard",
        metavar="MODEL",
        help="what every way of losing gains in speed and costs on a calibrated model and --text",
    )
    add("--text", metavar="FILE", type=Path, help="for --scoreboard: text that calibration has not seen")
    add("--systems", metavar="LIST", default="", help="for --scoreboard: some of its systems, or rungs")
    add("--plot", metavar="FILE", type=Path, help="for --scoreboard: draw speed against divergence")
    add("--simulate", action="store_true", help="only count misses of eviction policies on the traces")
    add("--json", action="store_true", help="print one JSON object")
    add(
        *OUT_FLAGS,
        dest="out",
        metavar="FILE",
        type=Path,
        help="also write FILE.json and FILE.md",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or only the simulation."""
    if args.scoreboard is not None:
        return _scoreboard(args)
    budgets = _words(args.budget or "12%,25%,100%", "--budget")
    if args.simulate:
        return _simulate(args, budgets)
    if args.write_model is not None:
        return _write_model(args)
    from mobile_gguf.bench.harness import run_benchmark
    from mobile_gguf.bench.other import DEFAULT_PATTERN, parse_other
    from mobile_gguf.bench.plan import BenchOptions, absolute_bytes
    from mobile_gguf.bench.report import write_report

    options = BenchOptions(
        trace=_only_trace(args),
        budgets=budgets,
        modes=_choices(args.modes, "--modes", MODES),
        versus=tuple(name for name in _choices(args.vs, "--vs", VERSUS) if name != "none"),
        others=tuple(
            parse_other(command, args.vs_pattern or DEFAULT_PATTERN, number)
            for number, command in enumerate(args.vs_command or (), start=1)
        ),
        evictions=_choices(args.eviction, "--eviction", EVICTION),
        size_bytes=absolute_bytes(args.size, "--size"),
        tokens=args.tokens or 32,
        repeats=args.repeats,
        slack_bytes=absolute_bytes(args.slack, "--slack"),
        arm_limit_s=float(args.arm_seconds),
        threads=_numbers(args.threads, "--threads") if args.threads else (),
        io_threads=_numbers(args.io_threads, "--io-threads"),
        engine_lib=args.engine_lib,
        stock_lib=args.stock_lib,
    )
    report = run_benchmark(options, _narrate)
    if args.out is not None:
        for path in write_report(report, args.out):
            _narrate(f"wrote {path}")
    print(json.dumps(report.to_json()) if args.json else report.to_text())
    return 1 if any(row.errors for row in report.rows) else 0


def _only_trace(args: argparse.Namespace) -> Path | None:
    if len(args.trace or ()) > 1:
        raise UsageError("only --simulate takes more than one --trace")
    return args.trace[0] if args.trace else None


def _write_model(args: argparse.Namespace) -> int:
    from mobile_gguf.bench.build import write_model
    from mobile_gguf.bench.geometry import scale_model
    from mobile_gguf.bench.plan import absolute_bytes
    from mobile_gguf.bench.report import describe_model
    from mobile_gguf.bench.synthetic import trace_at
    from mobile_gguf.bench.text import prompt_text

    if not 0 <= args.right <= 1:
        raise UsageError(f"--right {args.right:g} is no share: give a number from 0 to 1")
    trace = trace_at(_only_trace(args))
    shape = scale_model(trace, absolute_bytes(args.size, "--size"), args.right)
    _narrate(f"writing {args.write_model}: {describe_model(shape)}")
    write_model(args.write_model, trace, shape, replace=True)
    _narrate(
        f"it goes through {trace.n_decode} steps after this prompt, where the likeliest token is taken and "
        "no template is put around it:"
    )
    print(prompt_text(trace))
    return 0


def _scoreboard(args: argparse.Namespace) -> int:
    from mobile_gguf.bench.hardware import n_cpus
    from mobile_gguf.bench.plan import absolute_bytes
    from mobile_gguf.bench.report import write_report
    from mobile_gguf.bench.scoreboard import DEFAULT_TOKENS, ScoreOptions, plot, run_scoreboard
    from mobile_gguf.hub.resolve import resolve_model

    if args.text is None:
        raise UsageError("--scoreboard needs --text FILE, of the kind that the model is for")
    if args.plot is not None:
        check_plot(args.plot)
    threads = _numbers(args.threads, "--threads") if args.threads else (n_cpus(),)
    options = ScoreOptions(
        model=resolve_model(args.scoreboard),
        text=args.text,
        budgets=_words(args.budget or "12%,25%,50%", "--budget"),
        systems=_words(args.systems, "--systems") if args.systems else (),
        tokens=args.tokens or DEFAULT_TOKENS,
        repeats=args.repeats,
        slack_bytes=absolute_bytes(args.slack, "--slack"),
        threads=threads[0],
        limit_s=float(args.arm_seconds),
    )
    board = run_scoreboard(options, _narrate)
    if args.out is not None:
        for path in write_report(board, args.out):
            _narrate(f"wrote {path}")
    if args.plot is not None:
        plot(board, args.plot)
        _narrate(f"wrote {args.plot}")
    print(json.dumps(board.to_json()) if args.json else board.to_text())
    return 1 if board.failures else 0


def _simulate(args: argparse.Namespace, budgets: tuple[str, ...]) -> int:
    from mobile_gguf.bench.misses import count_misses, format_misses
    from mobile_gguf.bench.synthetic import synthesise_trace
    from mobile_gguf.bench.trace import read_trace

    traces = [read_trace(path) for path in args.trace or ()] or [synthesise_trace()]
    shares = [parse_size(text).fraction for text in budgets]
    known = [share for share in shares if share is not None]
    if len(known) != len(shares):
        raise UsageError("--simulate takes budgets as shares, such as 12.5%,25%")
    counted = [(trace, count_misses(trace, known)) for trace in traces]
    if args.json:
        print(json.dumps({"traces": [{"trace": trace.source, "rows": rows} for trace, rows in counted]}))
    else:
        print("\n\n".join(format_misses(trace, rows) for trace, rows in counted))
    return 0


def _narrate(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _words(text: str, flag: str) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UsageError(f"{flag} is empty")
    return words


def _choices(text: str, flag: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    words = _words(text, flag)
    for word in words:
        if word not in allowed:
            raise UsageError(f"{flag} {word!r}: choose from {', '.join(allowed)}")
    return words


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    words = _words(text, flag)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"{flag} {text!r} is not a list of numbers of at least 1, such as 1,2,4")
    return tuple(int(word) for word in words)
