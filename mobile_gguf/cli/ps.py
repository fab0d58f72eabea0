"""``mobile-gguf ps``: the servers and chats of this user that are running."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from mobile_gguf.files.running import Running, running
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import columns, format_duration, plain

from .common import narrate

_DESCRIPTION = """List the servers and chats of this user that are running: where they listen, the memory that
they take, how many experts are in memory, and how many answers they make now, of how many that they may,
some of which may still read their prompts. `mobile-gguf stop` ends a server."""
_HEADS = ("PID", "WHAT", "MODEL", "ADDRESS", "MEMORY", "EXPERTS", "ANSWERS", "SINCE")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "ps", help="list running servers and chats", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    found = running()
    if args.json:
        print(json.dumps({"processes": [facts_of(one) for one in found]}, ensure_ascii=False))
        return 0
    if not found:
        narrate("nothing is running: `mobile-gguf serve MODEL` starts a server")
        return 0
    for line in columns([_HEADS, *map(_row, found)], right=(0, 4)):
        print(line)
    return 0


def facts_of(one: Running) -> dict[str, Any]:
    """A process as JSON has it."""
    return {"pid": one.pid, "kind": one.kind, **one.facts, "memory_bytes": one.memory_bytes}


def _row(one: Running) -> tuple[str, ...]:
    facts = one.facts
    memory = one.memory_bytes
    experts = _of(facts.get("resident_experts"), facts.get("experts"))
    since = facts.get("since")
    return (
        str(one.pid),
        plain(one.kind),
        plain(str(facts.get("model") or "-")),
        plain(str(facts.get("address") or "-")),
        "-" if memory is None else format_bytes(memory),
        experts,
        _answers(facts),
        format_duration(time.time() - since) if isinstance(since, (int, float)) else "-",
    )


def _answers(facts: dict[str, Any]) -> str:
    said = _of(facts.get("answers"), facts.get("most_answers"))
    prompts = facts.get("prompts")
    if not isinstance(prompts, int) or not prompts:
        return said
    return f"{said}, {'1 reads its prompt' if prompts == 1 else f'{prompts} read their prompts'}"


def _of(some: Any, of: Any) -> str:
    return f"{some} of {of}" if some is not None and of else "-"
