"""``mobile-gguf convert``: a checkpoint or a stock GGUF to ours, and back."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.flags import OUT_FLAGS, add_arguments, given
from mobile_gguf.hub.cache import is_in_cache
from mobile_gguf.hub.reference import is_reference, parse_reference
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import name_lines

from .progress import Progress

if TYPE_CHECKING:
    from mobile_gguf.convert.options import ConvertOptions, ConvertResult

_DESCRIPTION = """\
Make a mobile GGUF: every routed expert a tensor of its own, so that it can be
read alone.

SOURCE is a GGUF (or the first file of a split one), a folder with a Hugging
Face checkpoint, or hf:ORG/REPO. A GGUF's weights are not changed by a bit;
--export turns the result back into the stock file.
"""
_EXAMPLES = """examples:
  mobile-gguf convert model.gguf                          # model.mobile.gguf
  mobile-gguf convert hf:ORG/REPO --outtype q4_k_m --dry-run
  mobile-gguf convert model.mobile.gguf --segments 4      # after `calibrate`
  mobile-gguf convert model.mobile.gguf --export          # model.stacked.gguf
  mobile-gguf convert model.gguf --check model.mobile.gguf  # same weights?
"""
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from mobile_gguf.convert.options import ConvertOptions

    parser = subparsers.add_parser(
        "convert",
        help="make a mobile GGUF of a checkpoint or a stock GGUF, or turn one back",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a GGUF, a checkpoint's folder, or hf:ORG/REPO")
    parser.add_argument(
        *OUT_FLAGS,
        metavar="OUT",
        dest="output",
        type=Path,
        help="the file to write (default: beside the source)",
    )
    parser.add_argument(
        "--check",
        metavar="OTHER",
        type=Path,
        help="write nothing; say whether two GGUFs hold the same weights, whatever their layouts",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_arguments(parser, ConvertOptions, skip=("verify",))
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="compare the result with Transformers (default: if torch is installed)",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from mobile_gguf.convert.options import ConvertOptions

    chosen = given(args, ConvertOptions)
    chosen["tensor_types"] = tuple(chosen.get("tensor_types", ()))
    options = ConvertOptions(**chosen)
    _check_options(options, set(chosen))
    with Progress(sys.stderr) as progress:
        if args.check is not None:
            return _check(args, set(chosen) - {"tensor_types"}, progress)
        result = _convert(args.source, args.output, options, progress)
    if args.json:
        print(json.dumps(result.as_json(), ensure_ascii=False))
    else:
        for name, value in rows(result):
            print(f"{name}\n{value}" if "\n" in value else name_lines([(name, value)], 24)[0])
    return result.exit_code


def rows(result: ConvertResult) -> list[tuple[str, str]]:
    """What a conversion did, or would do, for people; the result's own rows stand for the general ones."""
    own = {name for name, _ in result.rows}
    cut = "" if result.segments == 1 else f", {result.segments} segments"
    shown = [
        ("would write" if result.dry_run else "written", str(result.path)),
        ("layout", result.layout + cut),
        ("tensors", str(result.n_tensors)),
        ("size", f"{format_bytes(result.n_bytes)} ({result.n_bytes} bytes)"),
    ]
    if result.dry_run and "disk" not in own:
        enough = "enough" if result.peak_disk_bytes <= result.free_bytes else "NOT ENOUGH"
        shown += [
            ("disk needed", f"{format_bytes(result.peak_disk_bytes)} ({result.peak_disk_bytes} bytes)"),
            ("disk free", f"{format_bytes(result.free_bytes)} ({result.free_bytes} bytes): {enough}"),
        ]
    if not result.dry_run and "throughput" not in own:
        speed = result.n_bytes / max(result.seconds, 1e-9)
        shown.append(("time", f"{result.seconds:.1f} s ({format_bytes(speed)}/s)"))
    if result.verification is not None:
        shown.append(("verification", result.verification))
    return [*((name, value) for name, value in shown if name not in own), *result.rows]


def default_output(source: Path, options: ConvertOptions) -> Path:
    """Where a converted GGUF goes: ``STEM.mobile.gguf``, or ``STEM.stacked.gguf``, beside the source."""
    stem = _PART.sub("", source.name.removesuffix(".gguf")).removesuffix(".mobile").removesuffix(".stacked")
    if options.export or options.stacked:
        return source.with_name(f"{stem}.stacked.gguf")
    cut = f".s{options.segments}" if options.segments > 1 else ""
    return source.with_name(f"{stem}{cut}.mobile.gguf")


def _convert(
    source: str, output: Path | None, options: ConvertOptions, progress: Callable[[str, float], None]
) -> ConvertResult:
    if _is_checkpoint(source):
        if options.export:
            raise UsageError(f"{source} is a checkpoint: --export is for a GGUF of ours")
        if options.segments > 1 and options.segment_order == "importance":
            raise UsageError(
                "--segments orders neurons by importance, which no checkpoint says: convert it without,"
                " calibrate the result and convert that with --segments, or give --segment-order natural"
            )
        from mobile_gguf.convert.pipeline import convert_checkpoint

        return convert_checkpoint(source, output, options, progress=progress)
    from mobile_gguf.convert.gguf.layout import to_mobile, to_stacked

    path = resolve_model(source, progress)
    _refuse_for_gguf(path, options)
    out = output or default_output(Path(path.name) if is_in_cache(path) else path, options)
    written: dict[str, Any] = {"force": options.force, "dry_run": options.dry_run, "progress": progress}
    if options.export or options.stacked:
        return to_stacked(path, out, keep_mobile=not options.export, **written)
    return to_mobile(path, out, segments=options.segments, segment_order=options.segment_order, **written)


def _is_checkpoint(source: str) -> bool:
    if is_reference(source):
        reference = parse_reference(source)
        return not reference.file and not reference.quant
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in _CHECKPOINT_SUFFIXES:
        raise UsageError(f"{source} is one file of a checkpoint: give the folder it lies in")
    return path.is_dir() and not any(path.glob("*.gguf"))


def _check_options(options: ConvertOptions, chosen: set[str]) -> None:
    if options.export and (options.stacked or "segments" in chosen or "segment_order" in chosen):
        raise UsageError("--export gives a stock file: it goes without --stacked and --segments")
    if options.stacked and options.segments > 1:
        raise UsageError("--stacked leaves experts in one tensor: it goes without --segments")
    if "segment_order" in chosen and options.segments == 1:
        raise UsageError("--segment-order needs --segments")


def _refuse_for_gguf(path: Path, options: ConvertOptions) -> None:
    """A GGUF is repacked, never quantised again: what asks for that cannot be done."""
    from mobile_gguf.convert.options import ConvertOptions

    plain = ConvertOptions()
    for name in (
        "outtype",
        "experts",
        "attention",
        "tensor_types",
        "imatrix",
        "pure",
        "keep_intermediate",
        "pre_tokenizer",
        "no_mtp",
    ):
        if getattr(options, name) != getattr(plain, name):
            flag = "--tensor-type" if name == "tensor_types" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{path} is a GGUF, whose weights stay as they are: {flag} is for checkpoints")
    if options.verify:
        raise UsageError(f"{path} is a GGUF: --verify needs the checkpoint; --check compares two GGUFs")


def _check(args: argparse.Namespace, chosen: set[str], progress: Callable[[str, float], None]) -> int:
    if args.output is not None or chosen:
        raise UsageError("--check writes nothing: it goes with --json only")
    from mobile_gguf.convert.gguf.hashes import differences

    source = resolve_model(args.source, progress)
    other = resolve_model(args.check, progress)
    found = differences(source, other, progress)
    if args.json:
        print(json.dumps({"source": str(source), "other": str(other), "differences": found}))
    elif not found:
        print("the same weights")
    if found and not args.json:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise MobileError(f"the weights of {source} and {other} differ: {found[0]}{more}")
    return 1 if found else 0
