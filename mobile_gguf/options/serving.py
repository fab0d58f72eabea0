"""The options of ``mobile-gguf serve``, declared as the others are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from mobile_gguf.errors import UsageError
from mobile_gguf.sizes import Size, parse_size

from .opt import Checked, Opt, take_parsed, take_texts
from .words import POOLINGS

_MAX_PORT = (1 << 16) - 1
_MAX_INT32 = (1 << 31) - 1
_FOUR_MEBIBYTES = Size(n_bytes=4 << 20)


def _parse_bytes(value: Any) -> Size:
    size = parse_size(value)
    if size.n_bytes is None:
        raise UsageError(f"{size} is no number of bytes: give a size such as 4MiB")
    return size


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Checked):
    """How a server behaves."""

    host: Annotated[str, Opt("--host", help="address to listen on")] = "127.0.0.1"
    allow_host: Annotated[
        tuple[str, ...],
        Opt(
            "--allow-host",
            accept=take_texts,
            repeated=True,
            metavar="NAME",
            help="a name beside this machine's own that it is asked for by, such as a proxy's; * for any",
        ),
    ] = ()
    port: Annotated[int, Opt("--port", read=int, low=0, high=_MAX_PORT, help="port, 0: a free one")] = 8080
    alias: Annotated[
        tuple[str, ...],
        Opt(
            "--alias",
            accept=take_texts,
            repeated=True,
            metavar="NAME",
            help="the model's name to clients; repeatable",
        ),
    ] = ()
    api_key: Annotated[
        str | None,
        Opt(
            "--api-key",
            is_secret=True,
            metavar="KEY",
            help="what clients must send; others can see it in `ps`",
        ),
    ] = None
    api_key_file: Annotated[
        str | None, Opt("--api-key-file", metavar="FILE", help="the same, read from a file")
    ] = None
    queue: Annotated[int, Opt("--queue", read=int, low=0, high=_MAX_INT32, help="requests that may wait")] = (
        32
    )
    timeout: Annotated[
        float,
        Opt(
            "--timeout",
            read=float,
            low=0,
            high=_MAX_INT32,
            metavar="S",
            help="seconds for a request, 0: any",
        ),
    ] = 0.0
    grace: Annotated[
        float,
        Opt(
            "--grace",
            read=float,
            low=0,
            high=_MAX_INT32,
            metavar="S",
            help="seconds for the running answer at the end",
        ),
    ] = 10.0
    max_request: Annotated[
        Size,
        Opt(
            "--max-request",
            read=_parse_bytes,
            accept=take_parsed(_parse_bytes),
            metavar="SIZE",
            help="largest request",
        ),
    ] = _FOUR_MEBIBYTES
    cors: Annotated[
        tuple[str, ...],
        Opt(
            "--cors",
            accept=take_texts,
            repeated=True,
            metavar="ORIGIN",
            help="let a web site's scripts in, * for all; repeatable",
        ),
    ] = ()
    embeddings: Annotated[
        bool,
        Opt(
            "--embeddings",
            is_flag=True,
            help="/v1/embeddings also of a model that was not made for it; one that was needs no flag",
        ),
    ] = False
    pooling: Annotated[
        str | None,
        Opt("--pooling", choices=POOLINGS, help="... and what makes one vector of a text (default: mean)"),
    ] = None
    strict: Annotated[
        bool,
        Opt(
            "--strict",
            is_flag=True,
            help="refuse fields of requests that nobody knows; a note tells otherwise",
        ),
    ] = False
    log_requests: Annotated[
        bool, Opt("--log-requests", is_flag=True, help="a line on stderr for every request")
    ] = False
