"""``mobile-gguf engine rpc-server``: offer this machine's devices to others, by llama.cpp's own server."""

import argparse
import os
import signal
import sys
from typing import TextIO

from mobile_gguf.flags import reader
from mobile_gguf.options import LoadOptions

from .common import narrate

_DESCRIPTION = """Offer devices of this machine to `--rpc HOST:PORT` elsewhere, with llama.cpp's own RPC
server. Without --device these are all GPUs, or the CPU if there is none. Clients are served one by one.
The address goes to stdout when the server answers. Ctrl-C ends it. The protocol has no authentication and no
encryption: whoever can connect can use this machine and read what is sent, so listen on trusted networks
only."""


def register(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb below ``engine``."""
    parser = verbs.add_parser(
        "rpc-server", help="offer this machine's devices to other machines", description=_DESCRIPTION
    )
    parser.add_argument(
        "-H", "--host", default="127.0.0.1", help="IPv4 address to listen on (default: 127.0.0.1, loopback)"
    )
    parser.add_argument(
        "-p", "--port", type=_port, default=50052, help="port, 0: a free one (default: 50052)"
    )
    parser.add_argument(
        *("-d", "--device"),
        metavar="NAME",
        action="append",
        default=[],
        help="a device of `engine info`; may be given more than once, or as a comma-separated list",
    )
    parser.add_argument(
        *("-t", "--threads"),
        type=reader("threads", LoadOptions),
        metavar="N",
        help="threads of the CPU device (default: processors)",
    )
    parser.add_argument(
        "-c",
        "--cache",
        action="store_true",
        help="keep large tensors on disk, so that they are sent only once",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; returns only if the server could not go on."""
    from mobile_gguf.engine.log import capture_log
    from mobile_gguf.engine.rpc_server import RpcServer, choose_devices, choose_endpoint, is_loopback
    from mobile_gguf.errors import EngineError
    from mobile_gguf.files.paths import cache_dir
    from mobile_gguf.memory.threads import default_threads

    capture_log()
    devices = choose_devices([name for names in args.device for name in names.split(",") if name])
    endpoint = choose_endpoint(args.host, args.port)
    cache = None
    if args.cache:
        cache = cache_dir() / "rpc"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(f"cannot make the cache {cache} ({error.strerror})") from None
    if not is_loopback(endpoint):
        narrate(
            f"warning: {endpoint.host} can be reached from other machines, and the protocol has no "
            "authentication: never on an untrusted network"
        )
    answer = _keep_stdout()
    threads = args.threads or default_threads()[0]
    server = RpcServer(endpoint, devices, threads=threads, cache=cache)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    server.start()
    for device in devices:
        free, total = device.free_bytes / 2**30, device.total_bytes / 2**30
        narrate(f"{device.name}: {device.description}, {free:.1f} of {total:.1f} GiB free")
    print(f"listening on {endpoint}", file=answer, flush=True)
    server.wait()
    raise EngineError(f"the RPC server on {endpoint} cannot accept connections any more")


def _keep_stdout() -> TextIO:
    # llama.cpp's server writes its narration to stdout: that goes to stderr, our answer to the old stdout.
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _stop(_number: int, _frame: object) -> None:
    # The serving thread cannot be ended from here, and destructors must not run beside it.
    narrate("stopped")
    os._exit(0)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)
