"""``mobile-gguf show``: what a model is, what of it fits where, and what calibration found out about it."""

from __future__ import annotations

import argparse
import json
import sys

from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.explain import is_offline
from mobile_gguf.hub.pull import find_pulled
from mobile_gguf.hub.reference import is_reference, parse_reference
from mobile_gguf.hub.remote import read_remote_info
from mobile_gguf.hub.resolve import resolve_model

from ..chosen import MODEL_HELP
from ..common import narrate
from ..progress import Progress


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "show",
        help="show a model's geometry, byte counts, budgets and calibration",
        description="Read what a GGUF says about itself: its experts and their layout, how many of them a "
        "budget keeps in memory, verification, and what calibration measured.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--ascii", action="store_true", help="draw the heat map without colours and blocks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    # what reads arrays is imported only now, so that every other verb starts without numpy
    from mobile_gguf.convert.calibrate.store import read_statistics

    from . import heatmap
    from .report import calibrated_facts, facts, lines

    remote = None
    with Progress(sys.stderr) as progress:
        reference = parse_reference(args.model) if is_reference(args.model) else None
        if reference is not None and find_pulled(reference) is None and not is_offline():
            remote, info = read_remote_info(reference, progress)
        else:
            info = read_gguf_info(resolve_model(args.model, progress))
    # of a model on the Hub only the header is read, and the statistics are tensors
    statistics = (
        read_statistics(info.path) if keys.STATISTICS_N_TOKENS in info.metadata and remote is None else None
    )
    if args.json:
        found = facts(info) | calibrated_facts(info, statistics) | {"pulled": remote is None}
        print(json.dumps(found, ensure_ascii=False))
    else:
        if remote is not None:
            narrate(f"on the Hub, not pulled: `mobile-gguf pull {remote}` fetches it")
        fancy = heatmap.is_fancy(sys.stdout) and not args.ascii
        for line in lines(info, statistics, fancy=fancy):
            print(line)
    return 0
