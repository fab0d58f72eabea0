"""``mobile-gguf pull``: fetch a model from the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
import sys

from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.hub.pull import Pulled, pull
from mobile_gguf.hub.reference import parse_reference
from mobile_gguf.hub.resolve import DEMO
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import format_duration

from .common import narrate
from .progress import Progress

_DESCRIPTION = """\
Fetch a GGUF from the Hugging Face Hub into the Hugging Face cache, or only
what is missing of it. Without QUANT it is Q4_K_M, or what is nearest to that.
A download that was stopped goes on where it was; every file is checked against
its hash on the Hub. The path goes to stdout."""
_EXAMPLES = """examples:
  mobile-gguf pull hf:ORG/REPO
  mobile-gguf pull hf:ORG/REPO:Q5_K_M
  mobile-gguf pull hf:ORG/REPO/FILE.gguf@REVISION
  mobile-gguf pull https://huggingface.co/ORG/REPO

environment: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, as
with huggingface_hub"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "pull",
        help="fetch a model from the Hugging Face Hub",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="hf:ORG/REPO[:QUANT], an address on the Hub, or demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    if args.model == DEMO:
        return _build_demo(as_json=args.json)
    reference = parse_reference(args.model)
    with Progress(sys.stderr) as progress:
        try:
            pulled = pull(reference, progress)
        except KeyboardInterrupt:
            progress.show("")
            narrate(f"stopped: `mobile-gguf pull {args.model}` goes on from here")
            raise
    if args.json:
        print(json.dumps(pulled.to_dict(), ensure_ascii=False))
        return 0
    narrate(_summary(pulled))
    print(pulled.path)
    return 0


def _summary(pulled: Pulled) -> str:
    """What came, what it is, how to run it."""
    if pulled.received_bytes:
        speed = format_bytes(pulled.received_bytes / max(pulled.seconds, 1e-9))
        came = (
            f"pulled {format_bytes(pulled.received_bytes)} in {format_duration(pulled.seconds)} ({speed}/s)"
        )
    else:
        came = f"already there, {format_bytes(pulled.n_bytes)}, and the newest"
    try:
        what = _described(read_gguf_info(pulled.path))
    except MobileError as error:
        return f"{came}; it cannot be run: {' '.join(str(error).split())}"
    return f"{came}; {what}; run it: mobile-gguf run {pulled.reference}"


def _described(info: GgufInfo) -> str:
    if not info.is_moe:
        return "a dense model, no experts"
    return (
        f"{info.n_expert} experts in each of {info.n_layer_moe} layers, {format_bytes(info.expert_bytes)} of"
        f" {format_bytes(info.file_bytes)}"
    )


def _build_demo(*, as_json: bool) -> int:
    from mobile_gguf.hub.resolve import resolve_model

    with Progress(sys.stderr) as progress:
        path = resolve_model(DEMO, progress)
    print(json.dumps({"model": DEMO, "path": str(path)}) if as_json else path)
    return 0
