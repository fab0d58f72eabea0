"""``mobile-gguf serve``: OpenAI's API and a web chat for one model."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import signal
import socket
from pathlib import Path

from mobile_gguf.api.embedding import choose_pooling
from mobile_gguf.api.model import Model
from mobile_gguf.errors import EngineError, UsageError, install_hint
from mobile_gguf.flags import read_text_file, text_argument
from mobile_gguf.options.words import MEAN, POOLINGS, RANK
from mobile_gguf.sizes import parse_size

from .common import add_model_arguments, generate_options, load_model, narrate

KEY_VARIABLE = "MOBILE_GGUF_API_KEY"
_DESCRIPTION = f"""Serve a model: OpenAI's API under /v1, metrics for Prometheus, and a chat at the address
itself, which is printed on stdout. One request is answered at a time, the others wait in line. The flags of
generating are defaults for requests that do not say otherwise. An API key comes from --api-key,
--api-key-file or the environment variable {KEY_VARIABLE}."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "serve", help="OpenAI's API and a web chat", description=_DESCRIPTION, allow_abbrev=False
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("server options")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="a name beside this machine's own that it is asked for by, such as a proxy's; * for any",
    )
    group.add_argument(
        "--port", type=int, default=8080, metavar="N", help="port, 0: a free one (default: %(default)s)"
    )
    group.add_argument(
        "--alias",
        action="append",
        metavar="NAME",
        type=text_argument("the alias"),
        help="the model's name to clients; repeatable",
    )
    group.add_argument("--api-key", metavar="KEY", help="what clients must send; others can see it in `ps`")
    group.add_argument("--api-key-file", metavar="FILE", help="the same, read from a file")
    group.add_argument(
        "--queue", type=int, default=32, metavar="N", help="requests that may wait (default: %(default)s)"
    )
    group.add_argument(
        "--timeout", type=float, default=0.0, metavar="S", help="seconds for a request, 0: any (default: 0)"
    )
    group.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="seconds for the running answer at the end"
    )
    group.add_argument(
        "--max-request", default="4MiB", metavar="SIZE", help="largest request (default: %(default)s)"
    )
    group.add_argument(
        "--cors", action="append", metavar="ORIGIN", help="let a web site's scripts in, * for all; repeatable"
    )
    group.add_argument(
        "--embeddings",
        action="store_true",
        help="/v1/embeddings also of a model that was not made for it; one that was needs no flag",
    )
    group.add_argument(
        "--pooling", choices=POOLINGS, help="... and what makes one vector of a text (default: mean)"
    )
    group.add_argument("--log-requests", action="store_true", help="a line on stderr for every request")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from . import EXIT_INTERRUPTED

    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port is {args.port}: it must be between 0 and 65535")
    for name in ("queue", "timeout", "grace"):
        if not 0 <= getattr(args, name) < 1 << 31:
            raise UsageError(f"--{name} is {getattr(args, name)}: it must be at least 0")
    size = parse_size(args.max_request)
    if size.n_bytes is None or size.n_bytes <= 0:
        raise UsageError(f"--max-request is {args.max_request!r}: give a size such as 4MiB")
    key = read_key(args)
    try:
        from mobile_gguf.server.run import bind, serve
        from mobile_gguf.server.settings import ServerSettings
    except ImportError as error:
        raise EngineError(
            f"the server needs packages that are not installed ({error.name}): " + install_hint("server")
        ) from None
    local = is_loopback(args.host)
    options = generate_options(args)
    # before the model is loaded, which may take minutes
    with contextlib.closing(bind(args.host, args.port)) as bound, load_model(args) as model:
        pooling = embedding_pooling(args, model)
        stem = Path(args.model).stem
        names = tuple(dict.fromkeys([*(args.alias or ()), stem, args.model, model.path.stem]))
        settings = ServerSettings(
            names=names,
            defaults=options,
            api_key=key,
            queue=args.queue,
            max_request_bytes=size.n_bytes,
            timeout=args.timeout,
            grace=args.grace,
            hosts=allowed_hosts(args, key is not None),
            addresses=not local,
            origins=tuple(args.cors or ()),
            pooling=pooling,
        )

        def announce(url: str) -> None:
            print(url, flush=True)
            narrate(
                f"{model.info.name} ({model.mode}) as {names[0]}; chat at {url}, API at {url}/v1; "
                "Ctrl-C to stop"
            )
            if not local:
                lock = "it asks for the API key" if key else "anyone there can use it, without --api-key"
                narrate(f"warning: other machines can reach this server, and {lock}; it speaks plain HTTP")

        number = serve(
            model,
            settings,
            bound,
            announce=announce,
            stopping=lambda: narrate(
                f"stopping: the running answer has {args.grace:g} s to end; Ctrl-C again cuts it"
            ),
            log_requests=args.log_requests,
        )
    return EXIT_INTERRUPTED if number == signal.SIGINT else 0


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def allowed_hosts(args: argparse.Namespace, has_key: bool) -> tuple[str, ...]:
    """The names that the server answers to; none: any.

    A web site's own name may lead a visitor's browser to any address (DNS rebinding), so without a key other
    names than the machine's own have to be allowed.
    """
    from mobile_gguf.server.settings import LOOPBACK_NAMES

    asked = tuple(name.lower() for name in args.allow_host or ())
    if "*" in asked or (has_key and not is_loopback(args.host) and not asked):
        return ()
    own = socket.gethostname().lower()
    return (*LOOPBACK_NAMES, args.host.lower(), own, f"{own}.local", *asked)


def embedding_pooling(args: argparse.Namespace, model: Model) -> str | None:
    """What the server pools with, None if it makes no embeddings. Raises UsageError if the model cannot."""
    if not args.embeddings and args.pooling is None and model.pooling in (None, RANK):
        return None
    asked = args.pooling or (MEAN if model.pooling is None else None)
    return choose_pooling(model.pooling, asked, model.path.name)


def read_key(args: argparse.Namespace) -> str | None:
    """The API key from where it was given, None for none. Raises UsageError if it is no key."""
    if args.api_key is not None and args.api_key_file is not None:
        raise UsageError("give --api-key or --api-key-file, not both")
    where, key = "--api-key", args.api_key
    if args.api_key_file is not None:
        where = args.api_key_file
        key = read_text_file(where).strip()
    elif key is None:
        where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"the API key in {where} must be printable ASCII without spaces, and not empty")
    return key
