"""``mobile-gguf config``: the defaults of all options, and where each comes from."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mobile_gguf.config import PREFIX, config_path, known_options, options_of, read_defaults, read_preset
from mobile_gguf.options import declared, defaults
from mobile_gguf.options.opt import as_written
from mobile_gguf.wording import columns, plain

from .chosen import MODEL_HELP
from .progress import Progress

_DESCRIPTION = f"""Show every option's default and where it comes from. Flags come first, then a preset, the
environment ({PREFIX}RAM_BUDGET=40%, {PREFIX}TEMPERATURE=0.2), then the file, then what the model's file asks
for, then what is built in. The file is TOML: `ram_budget = "40%"`, a line for each option; what stands under
`[serve]` counts for that verb alone."""
_HIDDEN = "(hidden)"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from . import VERBS

    parser = subparsers.add_parser(
        "config",
        help="show the defaults of all options and where they come from",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"with what it asks for: {MODEL_HELP}")
    parser.add_argument("--for", dest="verb_for", metavar="VERB", choices=VERBS, default="", help="of a verb")
    preset = parser.add_argument("--preset", metavar="NAME", help="with what a preset says")
    vars(preset)["completes"] = "presets"
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from . import VERBS

    found = read_defaults(args.verb_for, VERBS)
    preset = read_preset(args.preset, args.verb_for, VERBS) if args.preset is not None else None
    found |= preset.options if preset is not None else {}
    model = args.model or (preset.model if preset is not None else None)
    asked = {} if model is None else _of_model(model)
    rows: list[tuple[str, Any, str]] = []
    for name in known_options(args.verb_for):
        if name in found:
            rows.append((name, _disclosed(name, found[name].value), found[name].source))
        elif name in asked:
            rows.append((name, asked[name], f"{model} asks for it"))
        else:
            rows.append((name, defaults(options_of(name))[name], "built in"))
    path = config_path()
    if args.json:
        values = {name: {"value": _plain_value(value), "from": source} for name, value, source in rows}
        print(json.dumps({"file": str(path), "exists": path.exists(), "options": values}, ensure_ascii=False))
        return 0
    print(f"file: {plain(str(path))}{'' if path.exists() else ' (not there)'}\n")
    shown = [(name, _shown(name, value), source) for name, value, source in rows]
    print("\n".join(columns([("OPTION", "VALUE", "FROM"), *(tuple(map(plain, row)) for row in shown)])))
    return 0


def _of_model(reference: str) -> dict[str, Any]:
    from mobile_gguf.generate.request.recommended import recommended
    from mobile_gguf.gguf.info import read_gguf_info
    from mobile_gguf.hub.resolve import resolve_model

    with Progress(sys.stderr) as progress:
        return recommended(read_gguf_info(resolve_model(reference, progress)))[0]


def _disclosed(name: str, value: Any) -> Any:
    return _HIDDEN if declared(options_of(name))[name].is_secret and value is not None else value


def _plain_value(value: Any) -> Any:
    value = as_written(value)
    return list(value) if isinstance(value, tuple) else value


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    value = _plain_value(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
