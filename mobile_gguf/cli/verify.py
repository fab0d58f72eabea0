"""``mobile-gguf verify``: is a GGUF what its checkpoint says?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mobile_gguf.flags import reader
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.cache import is_in_cache
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.options import LoadOptions

from .chosen import MODEL_HELP
from .common import narrate
from .progress import Progress

_DESCRIPTION = """\
Compare a GGUF's logits and tokens with those of the Hugging Face checkpoint
that it was made from.

Transformers runs the checkpoint, the engine the GGUF, on fixed prompts. F32,
F16 and BF16 files must agree to a thousandth and choose the same tokens; a
quantised file is judged by its KL divergence from the 16-bit file. The verdict
is written into the file. Exit code 0: passed; 1: failed, or not verified for
the reason told; 4: the engine did not survive the file.
"""
_EXAMPLES = """examples:
  mobile-gguf verify model-f16.gguf --reference ./checkpoint
  mobile-gguf verify model-q4_k_m.gguf --reference ./checkpoint \\
      --reference-gguf model-f16.gguf
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a GGUF with the checkpoint it was made from",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--reference", metavar="FOLDER", type=Path, required=True, help="the Hugging Face checkpoint's folder"
    )
    parser.add_argument(
        "--reference-gguf",
        metavar="FILE",
        type=Path,
        help="the 16-bit GGUF that a quantised one was made from",
    )
    parser.add_argument("--no-mark", action="store_true", help="leave the file as it is: write no verdict")
    threads = reader("threads", LoadOptions)
    parser.add_argument("-t", "--threads", type=threads, metavar="N", help="threads (default: the cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from mobile_gguf.convert.verify.check import mark, verify

    with Progress(sys.stderr) as progress:
        path = resolve_model(args.model, progress)
        result = verify(
            path, args.reference, reference_gguf=args.reference_gguf, threads=args.threads, progress=progress
        )
        why_not = ""
        if len(read_gguf_info(path).files) > 1:
            why_not = "is split over several files"
        elif is_in_cache(path):
            why_not = "lies in the Hugging Face cache, which other programs share"
        if not args.no_mark and not why_not:
            mark(path, result, progress)
    if why_not and not args.no_mark:
        narrate(f"{path.name} {why_not}: the verdict is not written into it")
    print(result.to_json() if args.json else result.table())
    return result.exit_code
