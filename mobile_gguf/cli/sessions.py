"""``mobile-gguf sessions``: the conversations on disk that a later start goes on with, and their removal."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mobile_gguf.api.last_conversation import conversation_path
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.paths import sessions_dir
from mobile_gguf.generate.sessions.session_files import Saved
from mobile_gguf.generate.sessions.session_store import SessionFolder
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import columns, format_duration, plain, why

from .common import confirmed, narrate, require_terminal
from .sessions_words import (
    add_export_arguments,
    add_name_argument,
    export,
    known_names,
    markdown_of,
    words_of,
)

_DESCRIPTION = """List what models have computed of conversations and keep on disk, so that a later start goes
on where they were, and the conversations whose words `--continue` goes on with. `sessions show` and
`sessions export` give words, `sessions rm` removes some by their names, or all. Saved chats of the screen
stay."""
_SHOW = "Show a conversation's words, or what is known of what a model computed of one."
_EXPORT = "Write a conversation as Markdown, or with --json as OpenAI's messages."
_WORD_HEADS = ("CONVERSATION", "MESSAGES", "USED")
_HEADS = ("NAME", "TOKENS", "SIZE", "USED", "MODEL")
_SHOWN = 12  # characters of a name
_DAMAGED = "damaged, or of another version"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "sessions",
        help="list, show, export or remove conversations kept for a later start",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)
    verbs = parser.add_subparsers(dest="sessions_verb", metavar="[show|export|rm]")
    shows = verbs.add_parser("show", help="show one", description=_SHOW, allow_abbrev=False)
    add_name_argument(shows)
    shows.add_argument("--json", action="store_true", help="print one JSON object")
    shows.set_defaults(func=show)
    exports = verbs.add_parser("export", help="write what was said", description=_EXPORT, allow_abbrev=False)
    add_export_arguments(exports)
    exports.set_defaults(func=export)
    rm = verbs.add_parser("rm", help="remove them", description=_DESCRIPTION, allow_abbrev=False)
    names = rm.add_argument("names", metavar="NAME", nargs="*", help="those of the list; none: all")
    vars(names)["completes"] = "sessions"
    rm.add_argument("-y", "--yes", action="store_true", help="do not ask")
    rm.add_argument("--json", action="store_true", help="print one JSON object")
    rm.set_defaults(func=remove)


def run(args: argparse.Namespace) -> int:
    """List them."""
    entries = _entries(SessionFolder(sessions_dir()))
    total = sum(size for size, _ in entries.values())
    if args.json:
        told = [_facts(path, size, saved) for path, (size, saved) in entries.items()]
        words = [{"name": name, **_word_facts(name)} for name in known_names()]
        folder = str(sessions_dir())
        print(json.dumps({"folder": folder, "bytes": total, "sessions": told, "conversations": words}))
        return 0
    tables = [columns([_HEADS, *_rows(entries)], right=(1, 2))] if entries else []
    if names := known_names():
        tables.append(columns([_WORD_HEADS, *map(_word_row, names)], right=(1,)))
    for at, table in enumerate(tables):
        print("\n" * bool(at) + "\n".join(table))
    states = "1 state" if len(entries) == 1 else f"{len(entries)} states"
    narrate(f"{states} in {sessions_dir()}, {format_bytes(total)}")
    return 0


def show(args: argparse.Namespace) -> int:
    """Show one: words, or the facts of a state."""
    if args.name in known_names():
        conversation = words_of(args.name)
        if args.json:
            said = {"name": args.name, **_word_facts(args.name), "messages": conversation.messages}
            print(json.dumps(said, ensure_ascii=False))
        else:
            sys.stdout.write(markdown_of(conversation))
        return 0
    entries = _entries(SessionFolder(sessions_dir()))
    path = _named([args.name], list(entries))[0]
    facts = _facts(path, *entries[path])
    if args.json:
        print(json.dumps(facts))
        return 0
    rows = [(name, value) for name, value in facts.items() if name not in ("fits", "bytes", "used_at")]
    rows[1:1] = [("size", format_bytes(facts["bytes"]))]
    rows += [(name, value) for name, value in facts.get("fits", {}).items() if name != "model"]
    for line in columns([(f"{name}:", plain(str(value))) for name, value in rows]):
        print(line)
    return 0


def remove(args: argparse.Namespace) -> int:
    """Remove some or all."""
    folder = SessionFolder(sessions_dir())
    entries = _entries(folder)
    words = [name for name in known_names() if not args.names or name in args.names]
    states = [name for name in args.names if name not in words]
    chosen = _named(states, list(entries)) if args.names else list(entries)
    said = [conversation_path(name) for name in words]
    if not args.yes:
        require_terminal()
        total = format_bytes(sum(entries[path][0] for path in chosen))
        if not confirmed(f"remove {_counted(chosen, words)}, {total}?"):
            narrate("nothing is removed")
            return 1
    try:
        freed = folder.remove(chosen)
        for path in said:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise MobileError(f"{error.filename or sessions_dir()}: {why(error)}") from None
    if args.json:
        removed = {"removed": [path.stem for path in chosen], "conversations": words, "freed_bytes": freed}
        print(json.dumps(removed))
    else:
        print(f"removed {_counted(chosen, words)}: {freed} bytes freed ({format_bytes(freed)})")
    return 0


def _counted(states: list[Path], words: list[str]) -> str:
    """What is removed, in words."""
    n = len(states)
    parts = [f"{n} session{'' if n == 1 else 's'}"] if n or not words else []
    return " and ".join([*parts, *([f"the words of {', '.join(words)}"] if words else [])])


def _entries(folder: SessionFolder) -> dict[Path, tuple[int, Saved | None]]:
    """What there is, the last used first. Raises MobileError if the folder cannot be read."""
    try:
        found = folder.entries()
    except OSError as error:
        raise MobileError(f"{folder.folder}: {why(error)}") from None
    return dict(sorted(found.items(), key=lambda item: -(item[1][1].used_at if item[1][1] else 0.0)))


def _named(names: list[str], paths: list[Path]) -> list[Path]:
    """The files that are meant by the beginnings of their names. Raises UsageError."""
    found = []
    for name in names:
        meant = [path for path in paths if name and path.stem.startswith(name)]
        if len(meant) != 1:
            problem = "more than one session begins so" if meant else "there is no such session"
            raise UsageError(f"{plain(name)}: {problem}; `mobile-gguf sessions` lists them")
        found += meant
    return list(dict.fromkeys(found))


def _word_facts(name: str) -> dict[str, Any]:
    path = conversation_path(name)
    try:
        used_at = path.stat().st_mtime
        return {"message_count": len(words_of(name).turns), "used_at": used_at}
    except (OSError, UsageError) as error:
        return {"problem": str(error)}


def _word_row(name: str) -> tuple[str, ...]:
    facts = _word_facts(name)
    if "problem" in facts:
        return name, "-", f"damaged: `mobile-gguf sessions show {name}` says how"
    used = f"{format_duration(max(0.0, time.time() - facts['used_at']))} ago"
    return name, str(facts["message_count"]), used


def _rows(entries: dict[Path, tuple[int, Saved | None]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for path, (size, saved) in entries.items():
        name = path.stem[:_SHOWN]
        if saved is None:
            rows.append((name, "-", format_bytes(size), "-", _DAMAGED))
        else:
            used = f"{format_duration(max(0.0, time.time() - saved.used_at))} ago"
            n_tokens = str(len(saved.tokens))
            rows.append((name, n_tokens, format_bytes(size), used, plain(Path(saved.model).name)))
    return rows


def _facts(path: Path, size: int, saved: Saved | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": path.stem, "bytes": size}
    if saved is None:
        return facts | {"problem": _DAMAGED}
    return facts | {
        "tokens": len(saved.tokens),
        "model": saved.model,
        "used_at": saved.used_at,
        "fits": saved.fits,
    }
