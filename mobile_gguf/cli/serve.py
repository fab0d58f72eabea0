"""``mobile-gguf serve``: OpenAI's API and a web chat for one model."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobile_gguf.api.embedding import choose_pooling
from mobile_gguf.api.model import Model
from mobile_gguf.api.stats import running_facts
from mobile_gguf.config import PREFIX, Default, values_of
from mobile_gguf.errors import EngineError, UsageError, install_hint
from mobile_gguf.files.running import SERVE, announced
from mobile_gguf.flags import add_arguments, given, read_text_file
from mobile_gguf.options import ServeOptions, make_options
from mobile_gguf.options.words import MEAN, RANK

from .chosen import settle
from .common import add_model_arguments, configured, generate_options, load_model, narrate

# Requests that are answered at once, where nobody says.
_PARALLEL = 4

_DESCRIPTION = f"""Serve a model: OpenAI's API under /v1, metrics for Prometheus, and a chat at the address
itself, which is printed on stdout. Several requests are answered at once, the others wait in line. The flags
of generating are defaults for requests that do not say otherwise. An API key comes from --api-key,
--api-key-file or the environment variable {PREFIX}API_KEY."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "serve", help="OpenAI's API and a web chat", description=_DESCRIPTION, allow_abbrev=False
    )
    add_model_arguments(parser)
    add_arguments(parser, ServeOptions)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from . import EXIT_INTERRUPTED

    settle(args)
    found = configured(args)
    flags = given(args, ServeOptions)
    asked = make_options(ServeOptions, values_of(found, ServeOptions) | flags)
    key = read_key(flags, found)
    try:
        from mobile_gguf.server.run import bind, serve
        from mobile_gguf.server.settings import ServerSettings
    except ImportError as error:
        raise EngineError(
            f"the server needs packages that are not installed ({error.name}): " + install_hint("server")
        ) from None
    local = is_loopback(asked.host)
    options = generate_options(args)
    seen = _Seen(args.model, asked)
    # before the model is loaded, which may take minutes
    with (
        contextlib.closing(bind(asked.host, asked.port)) as bound,
        announced(SERVE, seen.facts),
        load_model(args, parallel=_PARALLEL) as model,
    ):
        pooling = embedding_pooling(asked, model)
        stem = Path(args.model).stem
        names = tuple(dict.fromkeys([*asked.alias, stem, args.model, model.path.stem]))
        seen.names, seen.model = list(names), model
        settings = ServerSettings(
            names=names,
            defaults=options,
            api_key=key,
            queue=asked.queue,
            max_request_bytes=asked.max_request.n_bytes or 0,
            timeout=asked.timeout,
            grace=asked.grace,
            hosts=allowed_hosts(asked, key is not None),
            addresses=not local,
            origins=asked.cors,
            pooling=pooling,
            strict=asked.strict,
        )

        def announce(url: str) -> None:
            seen.address = url
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
                f"stopping: the running answer has {asked.grace:g} s to end; Ctrl-C again cuts it"
            ),
            log_requests=asked.log_requests,
        )
    return EXIT_INTERRUPTED if number == signal.SIGINT else 0


class _Seen:
    """What others see of this server (``mobile-gguf ps``), the model only once it is there."""

    def __init__(self, reference: str, asked: ServeOptions) -> None:
        self.names = [*asked.alias, reference]
        self.address = ""
        self.model: Model | None = None
        self._grace = asked.grace
        self._since = time.time()

    def facts(self) -> dict[str, Any]:
        """As they are now; for any thread."""
        told = {"model": self.names[0], "names": self.names, "address": self.address or "loading"}
        told |= {"grace": self._grace, "since": self._since}
        return told | (running_facts(self.model) if self.model is not None else {})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def allowed_hosts(asked: ServeOptions, has_key: bool) -> tuple[str, ...]:
    """The names that the server answers to; none: any.

    A web site's own name may lead a visitor's browser to any address (DNS rebinding), so without a key other
    names than the machine's own have to be allowed.
    """
    from mobile_gguf.server.settings import LOOPBACK_NAMES

    also = tuple(name.lower() for name in asked.allow_host)
    if "*" in also or (has_key and not is_loopback(asked.host) and not also):
        return ()
    own = socket.gethostname().lower()
    return (*LOOPBACK_NAMES, asked.host.lower(), own, f"{own}.local", *also)


def embedding_pooling(asked: ServeOptions, model: Model) -> str | None:
    """What the server pools with, None if it makes no embeddings. Raises UsageError if the model cannot."""
    if not asked.embeddings and asked.pooling is None and model.pooling in (None, RANK):
        return None
    pooling = asked.pooling or (MEAN if model.pooling is None else None)
    return choose_pooling(model.pooling, pooling, model.path.name)


def read_key(flags: Mapping[str, Any], found: Mapping[str, Default]) -> str | None:
    """The API key, None for none: of the flags, else the preset, else the environment, else the file.

    Raises UsageError if it is no key.
    """
    given = {name: Default(value, f"--{name.replace('_', '-')}") for name, value in flags.items()}
    preset = {name: default for name, default in found.items() if default.is_preset}
    environment = {name: default for name, default in found.items() if default.is_environment}
    for defaults in (given, preset, environment, found):
        key, file = defaults.get("api_key"), defaults.get("api_key_file")
        if key is not None and file is not None:
            raise UsageError(f"give {key.source} or {file.source}, not both")
        if file is not None:
            return checked_key(read_text_file(file.value).strip(), file.value)
        if key is not None:
            return checked_key(key.value, key.source)
    return None


def checked_key(key: str, where: str) -> str:
    """A key that can be sent. Raises UsageError, with where it is from."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"the API key in {where} must be printable ASCII without spaces, and not empty")
    return key
