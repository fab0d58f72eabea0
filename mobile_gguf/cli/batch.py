"""``mobile-gguf run --batch``: many prompts of a JSONL file, with progress."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from mobile_gguf.api.batch import (
    BatchItem,
    BatchStatus,
    OutputFile,
    StreamOutput,
    read_items,
    run_batch,
    settings_of,
)
from mobile_gguf.errors import UsageError
from mobile_gguf.flags import OUT_FLAGS
from mobile_gguf.options import POLICY_OPTIONS, GenerateOptions, make_options
from mobile_gguf.wording import format_duration, why

from .common import generate_options, load_model, load_options, narrate
from .progress import Progress

_SHOWN = 20


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a batch."""
    group = parser.add_argument_group("batch options")
    group.add_argument(
        "--batch",
        metavar="FILE",
        help='answer a JSONL file: {"prompt": ...} or {"messages": [...]} a line, with "id" and options by'
        " their names if need be; - for standard input",
    )
    group.add_argument(
        *OUT_FLAGS,
        dest="out",
        metavar="FILE",
        help="where the answers go, one JSON line each; goes on with what is there",
    )
    group.add_argument("--overwrite", action="store_true", help="begin FILE of --out again")
    group.add_argument("--strict", action="store_true", help="end at the first bad line, before any answer")


def run(args: argparse.Namespace) -> int:
    """Answer the lines that have no answer yet; 1 if a line failed."""
    _check(args)
    options = generate_options(args)
    make_options(GenerateOptions, options)
    items = read_items(_lines(args), options, args.system)
    if not items:
        raise UsageError(f"{args.batch} has no lines to answer")
    _report_bad(args.batch, items, strict=args.strict)
    loading = load_options(args)
    # drafts change no answer
    policy = {name: loading[name] for name in POLICY_OPTIONS if name in loading and name != "speculate"}
    seed = {name: value for name, value in loading.items() if name == "seed"}
    asked = {**policy, **seed, "system": args.system, "options": options}
    settings = settings_of(os.fspath(args.model), bool(args.raw), asked)
    keys = [item.key(settings) for item in items]
    if args.out in (None, "-"):
        output = StreamOutput(sys.stdout.buffer)
    elif Path(args.out).exists() and not Path(args.out).is_file():
        output = StreamOutput.open(Path(args.out))
    else:
        output = OutputFile(Path(args.out), keys, overwrite=args.overwrite)
    try:
        if output.n_before == len(items):
            narrate(f"all {len(items)} lines are answered: nothing to do")
            return 1 if output.n_failed_before else 0
        return _answer(args, items, keys, output)
    finally:
        output.close()


def _answer(
    args: argparse.Namespace, items: list[BatchItem], keys: list[str], output: OutputFile | StreamOutput
) -> int:
    if output.n_before:
        narrate(f"{output.n_before} of {len(items)} lines are answered: going on after them")
    with load_model(args, keeps_sessions=False) as model:
        raw = args.raw or (model.info.chat_template is None and args.system is None)
        with Progress(sys.stderr) as progress:
            shown = _Shown(progress)
            try:
                last = run_batch(model, items, keys, output, raw=raw, on_token=shown)
            except KeyboardInterrupt:
                progress.show("")
                narrate(f"stopped after {shown.n_done} of {len(items)} lines{_how_to_go_on(args)}")
                raise
    narrate(shown.summary(last))
    return 1 if last.n_failed else 0


class _Shown:
    """Shows lines, tokens per second and the time left, ten times a second at most."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._started = time.monotonic()
        self._told = 0.0
        self.n_done = 0

    def __call__(self, status: BatchStatus) -> None:
        now = time.monotonic()
        if status.n_done == self.n_done and now - self._told < 0.1:
            return
        self.n_done, self._told = status.n_done, now
        parts = [f"batch: {status.n_done} of {status.n_lines} lines"]
        seconds = now - self._started
        if status.n_tokens:
            parts.append(f"{status.n_tokens / max(seconds, 1e-9):.1f} tokens/s")
        n_now = status.n_done - status.n_before
        if n_now and status.n_done < status.n_lines:
            parts.append(f"{format_duration(seconds / n_now * (status.n_lines - status.n_done))} left")
        self._progress(", ".join(parts), status.n_done / status.n_lines)

    def summary(self, last: BatchStatus) -> str:
        """The batch in one line."""
        seconds = time.monotonic() - self._started
        failed = f", {last.n_failed} failed" if last.n_failed else ""
        speed = f"{last.n_tokens} tokens in {format_duration(seconds)}"
        passes = ""
        if last.predicted_ms is not None:
            passes = f" | {last.measured_ms:.0f} ms an iteration, {last.predicted_ms:.0f} foreseen"
        rate = f"{last.n_tokens / max(seconds, 1e-9):.1f} tokens/s"
        return f"{last.n_done} lines{failed} | {speed} | {rate}{passes}"


def _check(args: argparse.Namespace) -> None:
    if args.prompt or args.file is not None:
        raise UsageError("--batch takes its prompts from a file: give no other")
    if args.json:
        raise UsageError("--batch prints JSON lines already: it goes without --json")
    if args.overwrite and args.out in (None, "-"):
        raise UsageError("--overwrite needs --out FILE")
    if args.out not in (None, "-") and args.batch != "-":
        source, out = Path(args.batch), Path(args.out)
        if source.exists() and out.exists() and source.samefile(out):
            raise UsageError(f"--batch and --out are the same file, {args.out}")


def _lines(args: argparse.Namespace) -> list[bytes]:
    try:
        if args.batch == "-":
            return sys.stdin.buffer.readlines() if sys.stdin is not None else []
        with open(args.batch, "rb") as file:
            return file.readlines()
    except OSError as error:
        raise UsageError(f"cannot read {args.batch}: {why(error)}") from None


def _report_bad(source: str, items: list[BatchItem], *, strict: bool) -> None:
    bad = [item for item in items if item.error]
    if bad and strict:
        raise UsageError(f"{source}, line {bad[0].number}: {bad[0].error}")
    for item in bad[:_SHOWN]:
        narrate(f"{source}, line {item.number}: {item.error}")
    if len(bad) > _SHOWN:
        narrate(f"{source}: {len(bad) - _SHOWN} more bad lines")


def _how_to_go_on(args: argparse.Namespace) -> str:
    return "" if args.out in (None, "-") else ": the same command goes on from here"
