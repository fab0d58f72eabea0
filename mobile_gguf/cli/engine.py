"""``mobile-gguf engine``: build the patched llama.cpp, and say what is pinned, built and installed."""

import argparse
import json
import sys
from typing import Any

from mobile_gguf.flags import at_least_one
from mobile_gguf.wording import name_lines

from . import rpc_server
from .progress import BuildProgress

BACKENDS = ("cpu", "cuda", "vulkan", "hip", "metal")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "engine",
        help="build and inspect the patched llama.cpp",
        description="Build the patched llama.cpp that mobile-gguf runs on, say what is installed, or lend "
        "this machine's devices to others.",
    )
    verbs = parser.add_subparsers(dest="engine_verb", metavar="{build,info,rpc-server}", required=True)

    build = verbs.add_parser(
        "build",
        help="build the engine and install it into this Python environment; instant when nothing changed",
        description="Build llama-cpp-python with our patches and install it into this Python environment. "
        "What was built before is taken from the cache.",
    )
    build.add_argument(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="device backend beside cpu and rpc, which are always in; may be given more than once "
        "(default: those of the installed engine)",
    )
    build.add_argument(
        "--cuda-architectures",
        metavar="LIST",
        help="GPU architectures to compile for, such as '86;89' (default: those of this machine)",
    )
    build.add_argument("--stock", action="store_true", help="build the unpatched library too, for comparison")
    build.add_argument("--force", action="store_true", help="build again from the source distribution")
    build.add_argument(
        "--jobs", type=at_least_one, metavar="N", help="parallel compilations (default: processors)"
    )
    build.set_defaults(func=run)

    info = verbs.add_parser("info", help="show pin, patches, backends, ABI version and paths")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(func=run)

    rpc_server.register(verbs)


def run(args: argparse.Namespace) -> int:
    """Run ``engine build`` or ``engine info``."""
    return _build(args) if args.engine_verb == "build" else _info(args)


def _build(args: argparse.Namespace) -> int:
    import os

    from mobile_gguf import vendor

    chosen = args.backend or args.cuda_architectures or os.environ.get("CMAKE_ARGS")
    options = None
    if chosen:
        options = vendor.EngineOptions.create(args.backend or (), cuda_architectures=args.cuda_architectures)
    with BuildProgress(sys.stderr) as display:
        found = vendor.ensure_engine(
            options, stock=args.stock, force=args.force, jobs=args.jobs, progress=display.update
        )
    print(f"engine {found.version} is ready: {found.library}")
    if args.stock:
        print(f"stock library: {vendor.stock_lib_dir()}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from mobile_gguf import vendor

    info = vendor.engine_info() | _devices()
    print(json.dumps(info) if args.json else format_info(info))
    return 0


def _devices() -> dict[str, Any]:
    # Asked of the installed library; what keeps it from loading is no reason not to show the rest.
    from mobile_gguf.engine.devices import all_devices
    from mobile_gguf.engine.log import capture_log
    from mobile_gguf.errors import EngineError

    try:
        capture_log()
        devices = all_devices()
    except EngineError:
        return {"devices": []}
    return {"devices": [device.to_dict() for device in devices]}


def format_info(info: dict[str, Any]) -> str:
    """The answer of ``vendor.engine_info`` for people."""
    pin, installed = info["pin"], info["installed"]
    if installed is None:
        state = "none: run `mobile-gguf engine build`"
    elif not installed["patched"]:
        state = f"{installed['version']} without our patches: run `mobile-gguf engine build`"
    else:
        state = f"{installed['version']} ({', '.join(installed['backends'])}), key {installed['key']}"
        if not info["current"]:
            state += ", not the one of these patches and options: run `mobile-gguf engine build`"
    expected = info["abi_version_expected"]
    abi = "none" if info["abi_version"] is None else str(info["abi_version"])
    rows = [
        ("pin", f"{pin['package']} {pin['version']} (llama.cpp {pin['llama_cpp_commit']})"),
        ("sha256", pin["sha256"]),
        ("installed", state),
        ("library", info["library"] or "none"),
        ("ABI", abi if expected in (None, info["abi_version"]) else f"{abi} (the patches have {expected})"),
        ("stock", info["stock"] or "none: run `mobile-gguf engine build --stock`"),
        ("cache", info["cache"]),
    ]
    if info["problem"]:
        rows.insert(4, ("problem", info["problem"]))
    rows += [("device", _device_line(device)) for device in info.get("devices", [])]
    rows += [("patch", f"{patch['name']}: {patch['subject']}") for patch in info["patches"]]
    rows += [
        ("cached", f"{entry['key']} ({', '.join(entry['backends'])}), built {entry['built']}")
        for entry in info["cached"]
    ]
    return "\n".join(name_lines(rows, 11))


def _device_line(device: dict[str, Any]) -> str:
    free, total = device["memory_free"] / 2**30, device["memory_total"] / 2**30
    return f"{device['name']} ({device['type']}): {device['description']}, {free:.1f} of {total:.1f} GiB free"
