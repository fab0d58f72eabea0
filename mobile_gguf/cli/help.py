"""``mobile-gguf help [VERB]``: the help of the program or of a verb."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from . import VERBS

    parser = subparsers.add_parser(
        "help", help="show the help of a verb", description="The same as VERB --help."
    )
    parser.add_argument("topic", metavar="VERB", nargs="?", choices=VERBS, help="one of the verbs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from . import make_parser

    make_parser().parse_args([*([args.topic] if args.topic else []), "--help"])
    return 0
