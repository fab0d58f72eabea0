"""``mobile-gguf sessions``: the conversations on disk that a later start goes on with, and their removal."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from mobile_gguf.api.last_conversation import last_conversation_path
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.paths import sessions_dir
from mobile_gguf.generate.session_files import Saved
from mobile_gguf.generate.session_store import SessionFolder
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import columns, format_duration, plain

from .common import confirmed, narrate, require_terminal

_DESCRIPTION = """List what models have computed of conversations and keep on disk, so that a later start goes
on where they were, or remove it with `sessions rm`: some by their names, or all, and then with them the words
that --continue goes on with. Saved chats of the screen stay."""
_HEADS = ("NAME", "TOKENS", "SIZE", "USED", "MODEL")
_SHOWN = 12  # characters of a name
_DAMAGED = "damaged, or of another version"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "sessions",
        help="list or remove conversations kept for a later start",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)
    verbs = parser.add_subparsers(dest="sessions_verb", metavar="[rm]")
    rm = verbs.add_parser("rm", help="remove them", description=_DESCRIPTION, allow_abbrev=False)
    rm.add_argument("names", metavar="NAME", nargs="*", help="those of the list; none: all")
    rm.add_argument("-y", "--yes", action="store_true", help="do not ask")
    rm.add_argument("--json", action="store_true", help="print one JSON object")
    rm.set_defaults(func=remove)


def run(args: argparse.Namespace) -> int:
    """List them."""
    entries = _entries(SessionFolder(sessions_dir()))
    total = sum(size for size, _ in entries.values())
    if args.json:
        told = [_facts(path, size, saved) for path, (size, saved) in entries.items()]
        print(json.dumps({"folder": str(sessions_dir()), "bytes": total, "sessions": told}))
        return 0
    for line in columns([_HEADS, *_rows(entries)], right=(1, 2)):
        print(line)
    narrate(f"{len(entries)} in {sessions_dir()}, {format_bytes(total)}")
    return 0


def remove(args: argparse.Namespace) -> int:
    """Remove some or all."""
    folder = SessionFolder(sessions_dir())
    entries = _entries(folder)
    chosen = _named(args.names, list(entries)) if args.names else list(entries)
    last = [] if args.names else [path for path in (last_conversation_path(),) if path.exists()]
    if not args.yes:
        require_terminal()
        total = format_bytes(sum(entries[path][0] for path in chosen))
        words = " and the words of the last conversation" if last else ""
        if not confirmed(f"remove {_count(len(chosen))}, {total}{words}?"):
            narrate("nothing is removed")
            return 1
    try:
        freed = folder.remove(chosen)
        for path in last:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise MobileError(f"{error.filename or sessions_dir()}: {error.strerror or error}") from None
    if args.json:
        print(json.dumps({"removed": [path.stem for path in chosen], "freed_bytes": freed}))
    else:
        print(f"removed {_count(len(chosen))}: {freed} bytes freed ({format_bytes(freed)})")
    return 0


def _count(n: int) -> str:
    return f"{n} session{'' if n == 1 else 's'}"


def _entries(folder: SessionFolder) -> dict[Path, tuple[int, Saved | None]]:
    """What there is, the last used first. Raises MobileError if the folder cannot be read."""
    try:
        found = folder.entries()
    except OSError as error:
        raise MobileError(f"{folder.folder}: {error.strerror or error}") from None
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
