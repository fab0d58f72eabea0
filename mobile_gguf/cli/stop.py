"""``mobile-gguf stop``: end a server of this user in order, as Ctrl-C in its terminal would."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.running import SERVE, Running, running, start_of
from mobile_gguf.wording import plain

from .common import narrate

_DESCRIPTION = """End a server of this user: it takes no more requests, the answers that are made have its
--grace seconds to end, and what it computed is kept. It is named by its model, its port or its process
number, as `mobile-gguf ps` shows them; where only one runs it need not be named."""
# For what a server does besides, once the grace is over: closing the model, writing sessions.
_MORE_SECONDS = 60.0
_POLL_SECONDS = 0.05


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "stop", help="end a running server", description=_DESCRIPTION, allow_abbrev=False
    )
    which = parser.add_argument(
        "which", metavar="NAME", nargs="?", help="its model's name, its port or its process number"
    )
    vars(which)["completes"] = "servers"
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    server = chosen(running(), args.which)
    name = plain(str(server.facts.get("model") or "the server"))
    narrate(f"stopping {name} (process {server.pid})")
    end(server)
    if args.json:
        print(json.dumps({"stopped": server.pid, "model": server.facts.get("model")}))
    else:
        print(f"stopped {name}, process {server.pid}")
    return 0


def chosen(found: list[Running], which: str | None) -> Running:
    """The server that is meant. Raises UsageError if there is none, or more than one."""
    servers = [one for one in found if one.kind == SERVE]
    if which is None:
        meant = servers
    else:
        meant = [one for one in servers if which in names_of(one)]
        if not meant and any(which == str(one.pid) for one in found):
            raise UsageError(f"process {which} is a chat: leave it in its own window")
    if len(meant) == 1:
        return meant[0]
    if not servers:
        raise UsageError("no server of yours is running")
    listed = ", ".join(f"{one.pid} ({plain(str(one.facts.get('model')))})" for one in meant or servers)
    if not meant:
        raise UsageError(f"no server is called {plain(str(which))}: there are {listed}")
    raise UsageError(f"several servers are running, give one by its number: {listed}")


def names_of(server: Running) -> list[str]:
    """What a server may be named by: process, model and aliases, address, port."""
    facts = server.facts
    address = str(facts.get("address") or "")
    names = facts.get("names")
    aliases = [str(name) for name in names] if isinstance(names, list) else []
    port = address.rpartition(":")[2]
    return [name for name in (str(server.pid), str(facts.get("model")), *aliases, address, port) if name]


def end(server: Running) -> None:
    """Ask a server to end, and wait until it has. Raises UsageError, MobileError."""
    if sys.platform == "win32":
        raise UsageError("a server is ended by Ctrl-C in its own window here")
    grace = server.facts.get("grace")
    seconds = (grace if isinstance(grace, (int, float)) else 0.0) + _MORE_SECONDS
    try:
        _signal(server)
    except ProcessLookupError:
        return
    except PermissionError:
        raise UsageError(f"process {server.pid} belongs to another user") from None
    deadline = time.monotonic() + seconds
    while start_of(server.pid) == server.started:
        if time.monotonic() > deadline:
            raise MobileError(
                f"process {server.pid} has not ended in {seconds:.0f} s: another `mobile-gguf stop` cuts its "
                "answers"
            )
        time.sleep(_POLL_SECONDS)


def _signal(server: Running) -> None:
    """SIGTERM, to that process and to no later one of its number."""
    if not hasattr(os, "pidfd_open"):
        _require_known(server)
        os.kill(server.pid, signal.SIGTERM)
        return
    descriptor = os.pidfd_open(server.pid)
    try:
        _require_known(server)
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    finally:
        os.close(descriptor)


def _require_known(server: Running) -> None:
    if not server.is_known:
        raise UsageError(
            f"process {server.pid} cannot be told from another one here: end it by Ctrl-C in its own window"
        )
