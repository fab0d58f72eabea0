"""``mobile-gguf show``: what a model is, from its header alone."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..decode import default_little_k
from ..gguf_info import GgufInfo, read_gguf_info
from ..resolve import resolve_model
from ..sizes import format_bytes
from .common import Progress


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "show", help="show a model's geometry and byte counts", description="Read a GGUF's header."
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, a name from `mobile-gguf list`, or demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Progress(sys.stderr) as progress:
        path = resolve_model(args.model, progress)
    info = read_gguf_info(path)
    if args.json:
        print(json.dumps(facts(info), ensure_ascii=False))
    else:
        for name, value in rows(info):
            print(f"{name:<24}{value}")
    return 0


def facts(info: GgufInfo) -> dict[str, Any]:
    """The model's facts for JSON; bytes and counts."""
    return {
        "path": str(info.path),
        "name": info.name,
        "architecture": info.architecture,
        "quantization": info.quantization,
        "license": info.license,
        "file_bytes": info.file_bytes,
        "n_files": len(info.files),
        "n_layer": info.n_layer,
        "n_layer_moe": info.n_layer_moe,
        "n_embd": info.n_embd,
        "n_vocab": info.n_vocab,
        "n_ctx_train": info.n_ctx_train,
        "n_expert": info.n_expert,
        "n_expert_used": info.n_expert_used,
        "little_k": default_little_k(info.n_expert_used),
        "expert_bytes": info.expert_bytes,
        "dense_bytes": info.dense_bytes,
        "budget_min_bytes": info.budget_min_bytes,
        "has_chat_template": info.chat_template is not None,
    }


def rows(info: GgufInfo) -> list[tuple[str, str]]:
    """The same for people."""
    shown = [
        ("name", info.name),
        ("file", str(info.path)),
        ("size", format_bytes(info.file_bytes)),
        ("architecture", info.architecture),
        ("quantization", info.quantization),
        ("license", info.license or "not stated"),
        ("layers", str(info.n_layer)),
        ("context", f"{info.n_ctx_train} tokens"),
        ("chat template", "yes" if info.chat_template is not None else "no"),
    ]
    if not info.is_moe:
        return [*shown, ("experts", "none: a dense model")]
    smallest = info.budget_min_bytes
    share = 100 * smallest / info.expert_bytes
    return [
        *shown,
        ("experts", f"{info.n_expert} in each of {info.n_layer_moe} layers"),
        ("top-k", f"{info.n_expert_used} (little: {default_little_k(info.n_expert_used)})"),
        ("expert bytes", f"{info.expert_bytes} ({format_bytes(info.expert_bytes)})"),
        ("dense bytes", f"{info.dense_bytes} ({format_bytes(info.dense_bytes)})"),
        (
            "smallest --ram-budget",
            f"{smallest} ({format_bytes(smallest)}, {share:.1f}%)",
        ),
    ]
