"""``mobile-gguf list``: the models on this machine, and how each fits it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mobile_gguf.files.paths import models_dir
from mobile_gguf.hub.cache import cache_root
from mobile_gguf.hub.listing import CACHE, ModelEntry, fit_text, list_models, size_text
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import columns, plain

from .common import load_options, narrate

_DESCRIPTION = """List the demo model, the GGUF files in the data directory and those in the Hugging Face
cache: size, bytes of experts, the shares of them that `mobile-gguf run MODEL` would keep in memory and on
this machine's GPU now, and the tokens per second that `mobile-gguf plan` predicts of that, where it has
measured."""
_HEADS = ("NAME", "SIZE", "EXPERTS", "FIT", "TOK/S", "WHERE")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "list", help="list the models at hand", description=_DESCRIPTION, aliases=["ls"]
    )
    parser.add_argument("--paths", action="store_true", help="show where each file lies")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from mobile_gguf.plan.known import Here

    options = make_options(LoadOptions, load_options(args))
    here = Here(options.rpc, options)
    models = list_models(here)
    if here.problem:
        narrate(f"FIT and TOK/S are for the host alone, the devices cannot be asked: {here.problem}")
    if args.json:
        places = {"models_dir": str(models_dir()), "hub_cache": str(cache_root())}
        print(json.dumps({**places, "models": [entry.to_dict() for entry in models]}, ensure_ascii=False))
        return 0
    for line in lines(models, paths=args.paths):
        print(line)
    return 0


def lines(models: list[ModelEntry], *, paths: bool = False) -> list[str]:
    """A table; what cannot be run has its reason in place of the numbers."""
    return columns([_HEADS, *(_cells(entry, paths) for entry in models)], right=(1, 2, 4))


def _cells(entry: ModelEntry, paths: bool) -> tuple[str, ...]:
    name = plain(entry.name)
    place = _short(entry.path) if paths and entry.path is not None else ""
    if entry.info is None:
        reason = plain(entry.problem) + (f" ({place})" if place else "")
        return name, size_text(entry), reason
    layout = "" if entry.info.layout == "stacked" or not entry.info.is_moe else f", {entry.info.layout}"
    where = ("HF cache" if entry.where == CACHE else "models") + layout
    experts = format_bytes(entry.info.expert_bytes) if entry.info.is_moe else "none"
    return name, size_text(entry), experts, fit_text(entry), _speed(entry), place or where


def _speed(entry: ModelEntry) -> str:
    return f"{entry.speed.predicted_tps:.1f}" if entry.speed else "-"


def _short(path: Path) -> str:
    """A path with the home directory as ~."""
    try:
        return plain(f"~/{path.relative_to(Path.home())}")
    except (ValueError, RuntimeError):
        return plain(str(path))
