"""``python -m mobile_gguf.vendor``: for who changes the patches or the pin."""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from mobile_gguf.errors import MobileError

from . import engine, patchset, portable, source, worktree
from .pin import load_pin
from .progress import Progress
from .recipe import EngineOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mobile_gguf.vendor", description="Edit the patches, or move them to another pin."
    )
    commands = parser.add_subparsers(metavar="{tree,export,source,libraries,wheel}", required=True)
    tree = commands.add_parser("tree", help="unpack the pin into DIR as a git tree, one commit per patch")
    tree.add_argument("directory", metavar="DIR", type=Path)
    tree.add_argument(
        "--continue", dest="resume", action="store_true", help="a rejected patch was placed by hand: go on"
    )
    tree.set_defaults(func=_tree)
    export = commands.add_parser("export", help="write the commits of DIR back to patches/")
    export.add_argument("directory", metavar="DIR", type=Path)
    export.set_defaults(func=_export)
    stock = commands.add_parser("source", help="print the directory of the unpacked, unpatched source")
    stock.set_defaults(func=_source)
    libraries = commands.add_parser(
        "libraries",
        help="build both libraries with $CMAKE_ARGS into DIR/engine and DIR/stock; install nothing",
    )
    libraries.add_argument("directory", metavar="DIR", type=Path)
    libraries.set_defaults(func=_libraries)
    wheel = commands.add_parser("wheel", help="build an engine for any processor into DIR; install nothing")
    wheel.add_argument("directory", metavar="DIR", type=Path)
    wheel.add_argument(
        "--target",
        choices=portable.TARGETS,
        default=f"manylinux_2_28_{platform.machine()}",
        help="platform of the wheel (default: this machine's, %(default)s)",
    )
    wheel.add_argument("--backend", action="append", choices=("vulkan",), help="beside cpu and rpc")
    wheel.add_argument("--jobs", type=int, metavar="N", help="parallel compilations (default: processors)")
    wheel.set_defaults(func=_wheel)
    args = parser.parse_args(arguments)
    try:
        return args.func(args)
    except MobileError as error:
        print(f"mobile_gguf.vendor: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _tree(args: argparse.Namespace) -> int:
    patches = patchset.patches_dir()
    if args.resume:
        state = worktree.continue_tree(args.directory, patches)
    else:
        state = worktree.make_tree(args.directory, load_pin(), patches, narrate=_narrate)
    for name in state.applied:
        _narrate(f"applied {name}")
    if state.rejected is None:
        print(f"{args.directory}: edit, commit (one commit per patch), then export")
        return 0
    module = f"{Path(sys.executable).name} -m mobile_gguf.vendor"
    print(
        f"{state.rejected} does not apply; its rejected hunks are in {', '.join(state.rejects) or 'no file'}."
    )
    print(f"Place them by hand in {args.directory}, delete the .rej files, and run:")
    print(f"{module} tree {args.directory} --continue")
    print(f"{module} export {args.directory}")
    return 1


def _export(args: argparse.Namespace) -> int:
    for name in worktree.export_patches(args.directory, patchset.patches_dir()):
        print(name)
    return 0


def _source(args: argparse.Namespace) -> int:
    print(source.unpacked_source(load_pin(), narrate=_narrate))
    return 0


def _libraries(args: argparse.Namespace) -> int:
    for folder in engine.copy_libraries(EngineOptions.create(), args.directory, narrate=_narrate):
        print(folder)
    return 0


def _wheel(args: argparse.Namespace) -> int:
    # a build takes many minutes: each step is a line, as in a log
    made = engine.make_wheel(
        args.target,
        args.directory,
        backends=args.backend or (),
        jobs=args.jobs,
        progress=_narrate_progress,
    )
    print(made)
    return 0


def _narrate_progress(progress: Progress) -> None:
    at = f" {progress.done}/{progress.total} {progress.detail}" if progress.total else ""
    _narrate(progress.stage + at)


def _narrate(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
