"""``mobile-gguf calibrate``: measure a model on text and write what was learnt into its file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mobile_gguf.errors import UsageError
from mobile_gguf.files.plots import check_plot
from mobile_gguf.flags import OUT_FLAGS, at_least_one, reader
from mobile_gguf.hub.cache import is_in_cache
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import RAM
from mobile_gguf.sizes import AUTO, Size, parse_text

from .chosen import MODEL_HELP
from .common import narrate
from .progress import TimedProgress

_DESCRIPTION = """Run a model over text with all and with fewer experts, fit the importance head that mode
big-little uses, measure what each setting and each rung of the ladder costs and saves, count which experts
are used, and write it all into the file (or into a copy, --out). A run that was stopped goes on where it
was."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a model and store its importance head and statistics",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add(
        "--text", metavar="FILE", type=Path, nargs="+", action="extend", help="UTF-8 text (default: built in)"
    )
    add(
        "--tokens",
        metavar="N",
        type=at_least_one,
        help="at most so many tokens (default: 16384; of --plan 1536)",
    )
    add(
        *OUT_FLAGS,
        dest="out",
        metavar="FILE",
        type=Path,
        help="write a copy and leave MODEL as it is",
    )
    add(
        "--kl",
        metavar="X",
        type=_divergence,
        help="a token is important if little differs by more than this KL (default: a quarter of them are)",
    )
    add(
        "--imatrix",
        metavar="OUT.gguf",
        type=Path,
        help="also write an importance matrix, for `mobile-gguf convert --imatrix` and llama-quantize",
    )
    add(
        "--price-blocks",
        metavar="N",
        type=_blocks,
        default=6,
        help="blocks of text that the ladder's rungs are priced on, 0: none (default: 6)",
    )
    add(
        "--no-correction",
        action="store_true",
        help="find no corrections of little tokens, which --little-correction would use",
    )
    add("--plot", metavar="FILE", type=Path, help="draw the trade-off curves to a .png or .svg")
    add(
        "--plan",
        metavar="RAM=SIZE",
        type=_tier_budget,
        action="append",
        help="only choose which leading segments of experts to keep under a budget, and store that",
    )
    add("--no-resume", action="store_true", help="start anew, whatever a stopped run left")
    ram, threads = reader("ram_budget", LoadOptions), reader("threads", LoadOptions)
    add("--ram-budget", metavar="SIZE", type=ram, default=AUTO, help="memory for experts (default: auto)")
    add("-t", "--threads", metavar="N", type=threads, help="threads (default: the cores)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    if args.plan:
        return _plan(args)
    from mobile_gguf.convert.calibrate.plot import plot
    from mobile_gguf.convert.calibrate.report import lines
    from mobile_gguf.convert.calibrate.run import DEFAULT_TOKENS, CalibrateOptions, calibrate

    if args.plot is not None:
        check_plot(args.plot)
    options = CalibrateOptions(
        text=tuple(args.text or ()),
        tokens=args.tokens or DEFAULT_TOKENS,
        out=args.out,
        imatrix=args.imatrix,
        kl=args.kl,
        threads=args.threads,
        ram_budget=args.ram_budget,
        correction=not args.no_correction,
        price_blocks=args.price_blocks,
        resume=not args.no_resume,
    )
    with TimedProgress(sys.stderr) as progress:
        try:
            path = _own_file(args, progress)
            result = calibrate(path, options, progress)
        except KeyboardInterrupt:
            progress.show("")
            narrate("stopped: the same command goes on from here")
            raise
    if result.replaced:
        narrate("replaced an earlier calibration")
    if not result.within:
        narrate("no setting of the head is within 1% of big's perplexity: the nearest is the default")
    if result.prices is not None and result.prices.listed is None:
        narrate("rungs lost too little to be priced: mode auto will learn what they cost")
    if result.maps is None and not args.no_correction:
        narrate("the experts of some layer cannot be observed as a sum: no corrections of little tokens")
    if args.imatrix is not None:
        narrate(f"wrote {args.imatrix}")
    if args.plot is not None:
        plot(result.points, result.prices, args.plot, f"{result.path.name} on {result.text.name}")
        narrate(f"wrote {args.plot}")
    print(json.dumps(result.to_dict()) if args.json else "\n".join(lines(result)), flush=True)
    narrate(f"wrote {result.path}")
    return 0


def _blocks(text: str) -> int:
    number = int(text)
    if number < 0 or number == 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be 0, or at least 2")
    return number


_blocks.__name__ = "whole number"


def _own_file(args: argparse.Namespace, progress: TimedProgress) -> Path:
    """The model's file, which may be rewritten if there is no --out. Raises UsageError."""
    path = resolve_model(args.model, progress)
    if args.out is None and is_in_cache(path):
        raise UsageError(
            f"{path.name} lies in the Hugging Face cache, which other programs share: give --out FILE"
        )
    return path


def _plan(args: argparse.Namespace) -> int:
    """Choose splits, and nothing else."""
    from mobile_gguf.convert.calibrate.plan import DEFAULT_TOKENS, PlanOptions, plan_lines, plan_splits
    from mobile_gguf.gguf.info import read_gguf_info

    without = {"--kl": args.kl, "--imatrix": args.imatrix, "--plot": args.plot}
    if given := [flag for flag, value in without.items() if value is not None]:
        raise UsageError(f"--plan only chooses splits: leave out {' and '.join(given)}")
    options = PlanOptions(
        budgets=tuple(args.plan),
        text=tuple(args.text or ()),
        tokens=args.tokens or DEFAULT_TOKENS,
        out=args.out,
        threads=args.threads,
        ram_budget=args.ram_budget,
    )
    with TimedProgress(sys.stderr) as progress:
        path = _own_file(args, progress)
        planned = plan_splits(path, options, progress)
    if args.json:
        print(json.dumps({"path": str(args.out or path), "plans": [one.to_dict() for one in planned]}))
    else:
        print("\n".join(plan_lines(read_gguf_info(path), planned)), flush=True)
    narrate(f"wrote {args.out or path}")
    return 0


def _tier_budget(text: str) -> Size:
    tier, equals, size = text.partition("=")
    if not equals or tier.upper() != RAM:
        raise argparse.ArgumentTypeError(f"{text!r}: write RAM=SIZE, such as RAM=25% or RAM=4GiB")
    try:
        return parse_text(size)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _divergence(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: it must be a number above 0")
    return value


_divergence.__name__ = "number"
