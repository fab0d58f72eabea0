"""``--attach``: which server a chat is with, and by which key."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from mobile_gguf.config import PREFIX
from mobile_gguf.errors import UsageError
from mobile_gguf.flags import read_text_file

from .serve import checked_key, is_loopback

if TYPE_CHECKING:
    from mobile_gguf.remote.connection import Server

_VARIABLE = f"{PREFIX}API_KEY"


def add_attach_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a chat with a server."""
    group = parser.add_argument_group("options of a server's model")
    group.add_argument(
        "--attach",
        metavar="URL",
        help="chat with a model of a server that has OpenAI's API, such as `mobile-gguf serve`; --model says"
        " which",
    )
    group.add_argument("--api-key", metavar="KEY", help="the server's key; others can see it in `ps`")
    group.add_argument("--api-key-file", metavar="FILE", help="the same, read from a file")


def server_of(args: argparse.Namespace) -> Server | None:
    """The server that is asked for, None for none. Raises UsageError."""
    key, file = getattr(args, "api_key", None), getattr(args, "api_key_file", None)
    if getattr(args, "attach", None) is None:
        if key is not None or file is not None:
            raise UsageError("an API key is for a server: give its address by --attach URL")
        return None
    from mobile_gguf.remote.connection import Server

    if key is not None and file is not None:
        raise UsageError("give --api-key or --api-key-file, not both")
    if file is not None:
        return Server(args.attach, checked_key(read_text_file(file).strip(), file))
    if key is not None:
        return Server(args.attach, checked_key(key, "--api-key"))
    server = Server(args.attach)
    own = os.environ.get(_VARIABLE)
    # that of one's own server, which is told to no other machine
    return Server(args.attach, checked_key(own, _VARIABLE)) if own and is_loopback(server.host) else server
