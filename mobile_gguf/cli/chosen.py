"""Which model a command is about, and what a preset says besides: MODEL, ``--model`` and ``--preset``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobile_gguf.config import Preset, read_preset
from mobile_gguf.errors import UsageError
from mobile_gguf.hub.reference import is_reference
from mobile_gguf.hub.resolve import DEMO, local_models, model_name
from mobile_gguf.wording import plain

MODEL_HELP = "a GGUF file, a name from `mobile-gguf list`, hf:org/repo[:quant], or demo"


def add_chosen_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """MODEL, which a flag or a preset may say instead, and ``--preset``."""
    model = parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    vars(model)["is_needed"] = not optional
    parser.add_argument(
        "-m", "--model", dest="named_model", metavar="MODEL", help="the same as a flag, before a preset's"
    )
    preset = parser.add_argument(
        "--preset",
        metavar="NAME",
        help="options, and maybe a model and a system message, from a file of your presets",
    )
    vars(preset)["completes"] = "presets"


def settle(args: argparse.Namespace, *, optional: bool = False) -> None:
    """Have ``args.model`` be the model that is meant, and the rest of the words a prompt.

    A preset's file is read here, and its system message taken where no flag has one. Raises UsageError.
    """
    if hasattr(args, "found_preset"):
        return
    from . import VERBS

    args.found_preset = preset = _preset(args, VERBS)
    named = args.named_model if args.named_model is not None else preset.model if preset is not None else None
    if named is not None and args.model is not None:
        if hasattr(args, "prompt"):
            _refuse_second_model(args, preset)
            args.prompt, args.model = [args.model, *args.prompt], named
        elif args.named_model is not None:
            raise UsageError(f"give MODEL or --model, not both: {plain(args.model)} or {plain(named)}")
    if args.model is None:
        args.model = named
    if args.model is None and not optional:
        raise UsageError(f"the following arguments are required: MODEL, {MODEL_HELP}")
    if preset is not None and hasattr(args, "system") and args.system is None:
        args.system = preset.system


def _preset(args: argparse.Namespace, verbs: tuple[str, ...]) -> Preset | None:
    return read_preset(args.preset, args.verb, verbs) if args.preset is not None else None


def _refuse_second_model(args: argparse.Namespace, preset: Preset | None) -> None:
    """Where the model is known, what stands in its place belongs to the prompt, unless it is a model."""
    if not _is_model(args.model):
        return
    who = "--model" if args.named_model is not None or preset is None else f"the preset {preset.name}"
    raise UsageError(
        f"{plain(args.model)} is a model, and {who} names one already: say --model {plain(args.model)}, or "
        "give the prompt alone"
    )


def _is_model(word: str) -> bool:
    path = Path(word)
    return (
        word == DEMO
        or is_reference(word)
        or (path.suffix == ".gguf" and path.exists())
        or any(model_name(path) == word for path in local_models())
    )
