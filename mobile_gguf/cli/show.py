"""``mobile-gguf show``: what a model is, what of it fits where, and what calibration found out about it."""

from __future__ import annotations

import argparse
import json
import sys

from ..gguf_info import read_gguf_info
from ..resolve import resolve_model
from .common import Progress


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "show",
        help="show a model's geometry, byte counts, budgets and calibration",
        description="Read what a GGUF says about itself: its experts and their layout, how many of them a "
        "budget keeps in memory, verification, and what calibration measured.",
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, a name from `mobile-gguf list`, or demo")
    parser.add_argument("--ascii", action="store_true", help="draw the heat map without colours and blocks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    # what reads arrays is imported only now, so that every other verb starts without numpy
    from mobile_gguf.convert.calibrate.store import N_TOKENS, read_statistics

    from . import heatmap
    from .show_report import calibrated_facts, facts, lines

    with Progress(sys.stderr) as progress:
        path = resolve_model(args.model, progress)
    info = read_gguf_info(path)
    statistics = read_statistics(path) if N_TOKENS in info.metadata else None
    if args.json:
        print(json.dumps(facts(info) | calibrated_facts(info, statistics), ensure_ascii=False))
    else:
        fancy = heatmap.is_fancy(sys.stdout) and not args.ascii
        for line in lines(info, statistics, fancy=fancy):
            print(line)
    return 0
