"""``mobile-gguf rm``: remove models and give their bytes back."""

from __future__ import annotations

import argparse
import json

from mobile_gguf.hub.remove import Removal, plan_removal
from mobile_gguf.sizes import format_bytes

from .common import confirmed, narrate, require_terminal

_DESCRIPTION = """Remove models: files of the data directory, or of the Hugging Face cache what no other
revision there uses. On a terminal it asks first; elsewhere it needs --yes."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "rm", help="remove a model", description=_DESCRIPTION, allow_abbrev=False, aliases=["remove"]
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a name from `mobile-gguf list`, or hf:org/repo[:quant]"
    )
    parser.add_argument("--all", action="store_true", help="the whole repository: every file and revision")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    removals = [plan_removal(name, everything=args.all) for name in dict.fromkeys(args.models)]
    if not args.yes:
        require_terminal()
    done = []
    for removal in removals:
        if args.yes or confirmed(f"remove {removal.name}, {format_bytes(removal.freed_bytes)}?"):
            removal.execute()
            done.append(removal)
            if not args.json:
                print(f"removed {removal.name}: {removal.freed_bytes} bytes freed{_human(removal)}")
            if removal.kept:
                narrate(removal.kept)
        else:
            narrate(f"kept {removal.name}")
    if args.json:
        removed = [
            {"model": r.name, "freed_bytes": r.freed_bytes, "files": [str(path) for path in r.files]}
            for r in done
        ]
        print(json.dumps({"removed": removed, "freed_bytes": sum(r.freed_bytes for r in done)}))
    return 0 if len(done) == len(removals) else 1


def _human(removal: Removal) -> str:
    return f" ({format_bytes(removal.freed_bytes)})" if removal.freed_bytes >= 1024 else ""
