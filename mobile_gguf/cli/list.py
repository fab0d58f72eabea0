"""``mobile-gguf list``: the models that can be run by name."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..paths import models_dir
from ..resolve import DEMO, demo_file, local_models
from ..sizes import format_bytes


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "list",
        help="list the models at hand",
        description="List the demo model and the GGUF files in the data directory.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    models = entries()
    if args.json:
        print(json.dumps({"models_dir": str(models_dir()), "models": models}, ensure_ascii=False))
        return 0
    width = max(len(entry["name"]) for entry in models)
    for entry in models:
        size = format_bytes(entry["bytes"]) if entry["bytes"] is not None else "-"
        where = entry["path"] or "not built yet: `mobile-gguf run demo` does it"
        print(f"{entry['name']:<{width}}  {size:>10}  {where}")
    return 0


def entries() -> list[dict[str, Any]]:
    """The demo model and the others: name, path and bytes, both None for a demo not built yet."""
    demo = demo_file()
    named = [(DEMO, demo), *((path.stem, path) for path in local_models())]
    return [
        {
            "name": name,
            "path": str(path) if path is not None else None,
            "bytes": path.stat().st_size if path is not None else None,
        }
        for name, path in named
    ]
