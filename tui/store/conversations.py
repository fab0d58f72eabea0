"""Saved conversations: a SQLite file with full-text search, through sqlite-utils."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from sqlite_utils import Database

from mobile_gguf.errors import MobileError
from mobile_gguf.files.lock import exclusive

from ..engine.outbox import Token

Opened = TypeVar("Opened")
MAX_TITLE = 60
_BUSY_SECONDS = 30.0  # others write for milliseconds, but a busy disk takes its time
_TRIES = (
    20  # of 0.1 s: SQLite says "locked" at once, and does not wait, while another opens or closes the file
)
_OF_THE_MOMENT = (sqlite3.OperationalError, sqlite3.ProgrammingError, sqlite3.InterfaceError)


class StoreError(MobileError):
    """The conversations' file cannot be read or written; ``broken``: its content is damaged."""

    def __init__(self, text: str, *, broken: bool = False) -> None:
        super().__init__(text)
        self.broken = broken


@dataclass
class Turn:
    """One message of a conversation; an answer also has its tokens and its receipt line."""

    role: str
    content: str
    receipt: str = ""
    tokens: list[Token] = field(default_factory=list)
    model: str = ""


@dataclass(frozen=True)
class Summary:
    """A conversation in a list; ``snippet`` is where a search found its words."""

    id: int
    title: str
    model: str
    updated: str
    n_turns: int
    snippet: str = ""


class ConversationStore:
    """The conversations of one user. Every method raises StoreError when SQLite cannot do it."""

    def __init__(self, path: Path | None) -> None:
        """Open or create the file at ``path``; None keeps everything in memory."""
        self.path = path
        with _as_store_error(path):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                # SQLite lets nobody wait for the change of its journal, nor for a table that another makes
                with exclusive(path.with_name(path.name + ".lock")):
                    if not path.exists():
                        path.touch(0o600)  # what is talked about is nobody else's, whatever the umask
                    self._db = _patiently(lambda: self._open(path))
            else:
                self._db = Database(memory=True)
                self._migrate()

    def _open(self, path: Path) -> Database:
        self._db = Database(sqlite3.connect(path, timeout=_BUSY_SECONDS))
        try:
            self._db.enable_wal()
            self._migrate()
        except BaseException:
            self._db.close()
            raise
        return self._db

    def _migrate(self) -> None:
        conversations, messages = self._table("conversations"), self._table("messages")
        if not conversations.exists():
            columns = {"id": int, "title": str, "system": str, "model": str, "created": str, "updated": str}
            conversations.create(columns, pk="id")
        if not messages.exists():
            columns = {
                **{"id": int, "conversation": int, "position": int, "role": str, "content": str},
                **{"receipt": str, "tokens": str, "model": str, "created": str},
            }
            messages.create(columns, pk="id", foreign_keys=[("conversation", "conversations", "id")])
            messages.create_index(["conversation", "position"])
            messages.enable_fts(["content"], create_triggers=True, tokenize="porter unicode61")

    def _table(self, name: str) -> Any:
        return self._db[name]

    def create(self, title: str, model: str, system: str = "") -> int:
        """Start a conversation; returns its id."""
        now = _now()
        row = {"title": shorten(title), "system": storable(system), "model": storable(model)}
        row |= {"created": now, "updated": now}
        return self._write(lambda: int(self._table("conversations").insert(row).last_pk))

    def _write(self, step: Callable[[], Opened]) -> Opened:
        """Do a step whole or not at all.

        The write lock comes first: who begins by reading is refused where another has written meanwhile. And
        SQLite does not wait in every case, such as while another opens or closes the file.
        """

        def whole() -> Opened:
            with self._db.conn:
                self._db.conn.execute("begin immediate")
                return step()

        with _as_store_error(self.path):
            return _patiently(whole)

    def append(self, conversation: int, position: int, turn: Turn) -> None:
        """Save a turn at ``position``, 0 first, in place of it and all later ones."""
        row = {
            "conversation": conversation,
            "position": position,
            "role": turn.role,
            "content": storable(turn.content),
            "receipt": turn.receipt,
            "tokens": json.dumps([_as_list(token) for token in turn.tokens]),
            "model": storable(turn.model),
            "created": _now(),
        }

        def step() -> None:
            self._cut(conversation, position)
            self._table("messages").insert(row)
            self._touch(conversation, turn.model)

        self._write(step)

    def cut(self, conversation: int, position: int) -> None:
        """Forget the turns from ``position`` on."""
        self._write(lambda: self._cut(conversation, position))

    def _cut(self, conversation: int, position: int) -> None:
        self._table("messages").delete_where("conversation = ? and position >= ?", [conversation, position])

    def _touch(self, conversation: int, model: str) -> None:
        changes = {"updated": _now()} | ({"model": storable(model)} if model else {})
        self._update(conversation, changes)

    def _update(self, conversation: int, changes: dict[str, str]) -> None:
        self._table("conversations").update(conversation, changes)

    def rename(self, conversation: int, title: str) -> None:
        """Give a conversation another title."""
        self._write(lambda: self._update(conversation, {"title": shorten(title)}))

    def set_system(self, conversation: int, system: str) -> None:
        """Save a conversation's system message."""
        self._write(lambda: self._update(conversation, {"system": storable(system)}))

    def delete(self, conversation: int) -> None:
        """Forget a conversation."""

        def step() -> None:
            self._cut(conversation, 0)
            self._table("conversations").delete_where("id = ?", [conversation])

        self._write(step)

    def open(self, conversation: int) -> tuple[str, str, list[Turn]]:
        """Title, system message and turns. Raises StoreError if there is no such conversation."""
        with _as_store_error(self.path):
            heads = list(
                self._db.query("select title, system from conversations where id = ?", [conversation])
            )
            rows = list(
                self._db.query(
                    "select * from messages where conversation = ? order by position", [conversation]
                )
            )
        if not heads:
            raise StoreError("this conversation has been deleted")
        return heads[0]["title"], heads[0]["system"] or "", [_turn(row) for row in rows]

    def search(self, words: str = "", limit: int = 200) -> list[Summary]:
        """Conversations, the latest first; with ``words`` those that say them, the best match first."""
        with _as_store_error(self.path):
            if not words.strip():
                return [_summary(row) for row in self._db.query(_LATEST, {"limit": limit})]
            values = {"words": _prefix_query(words), "title": f"%{words.strip()}%", "limit": limit}
            return [_summary(row) for row in self._db.query(_SEARCH, values)]

    def named(self, name: str) -> list[Summary]:
        """Conversations whose title, or number, is ``name``, the latest first."""
        wanted = shorten(name).casefold()
        return [one for one in self.search() if one.title.casefold() == wanted or str(one.id) == name]

    def prompts(self, limit: int = 500) -> list[str]:
        """What the user asked, oldest first, each text once."""
        query = (
            "select content, max(id) as latest from messages where role = 'user' "
            "group by content order by latest desc limit ?"
        )
        with _as_store_error(self.path):
            return [row["content"] for row in self._db.query(query, [limit])][::-1]

    def check(self) -> None:
        """Raise StoreError if the file is damaged, wherever in it."""
        with _as_store_error(self.path):
            rows = [row[0] for row in self._db.execute("pragma quick_check(1)").fetchall()]
            if rows != ["ok"]:
                raise sqlite3.DatabaseError(" ".join(str(rows[0]).split()) if rows else "it is damaged")

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _patiently(step: Callable[[], Opened]) -> Opened:
    for _ in range(_TRIES - 1):
        try:
            return step()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
        time.sleep(0.1)
    return step()


_LATEST = """
select c.id, c.title, c.model, c.updated, '' as snippet,
       (select count(*) from messages m where m.conversation = c.id) as n_turns
from conversations c order by c.updated desc, c.id desc limit :limit
"""

_SEARCH = """
with found as (
    select m.conversation, snippet(messages_fts, 0, '[', ']', '…', 12) as snippet, messages_fts.rank as rank
    from messages_fts join messages m on m.id = messages_fts.rowid
    where messages_fts match :words
    union all
    select id, '', 0.0 from conversations where title like :title
)
select c.id, c.title, c.model, c.updated, max(found.snippet) as snippet,
       (select count(*) from messages m where m.conversation = c.id) as n_turns
from found join conversations c on c.id = found.conversation
group by c.id order by min(found.rank), c.updated desc limit :limit
"""


def _prefix_query(words: str) -> str:
    # every word as a quoted string, so that nothing the user types is FTS syntax; the last may be unfinished
    quoted = ['"' + word.replace('"', '""') + '"' for word in words.split()]
    return " ".join(quoted) + "*"


def _summary(row: dict[str, Any]) -> Summary:
    return Summary(
        row["id"], row["title"], row["model"] or "", row["updated"], row["n_turns"], row["snippet"] or ""
    )


def _as_list(token: Token) -> list[Any]:
    """A token's fields in their order; its thoughts only where it has some."""
    thought = [token.reasoning] if token.reasoning else []
    return [token.text, token.kind, round(token.seconds, 4), token.n_bytes, *thought]


def _turn(row: dict[str, Any]) -> Turn:
    try:
        tokens = [Token(*item) for item in json.loads(row["tokens"] or "[]")]
    except (ValueError, TypeError):
        tokens = []
    return Turn(row["role"], row["content"] or "", row["receipt"] or "", tokens, row["model"] or "")


def shorten(title: str) -> str:
    """A title: one line of at most MAX_TITLE characters."""
    line = " ".join(storable(title).split())
    return (line if len(line) <= MAX_TITLE else line[: MAX_TITLE - 1].rstrip() + "…") or "Untitled"


def storable(text: str) -> str:
    """Text without halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-8", errors="replace").decode()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class _as_store_error:
    """Turns what SQLite and the file system raise into a StoreError that names the file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, (sqlite3.Error, OSError)):
            where = self._path if self._path is not None else "memory"
            # an OperationalError is of the disk or of the moment, its base class of the content
            broken = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, _OF_THE_MOMENT)
            raise StoreError(f"conversations in {where} cannot be used: {error}", broken=broken) from None


def move_aside(path: Path) -> Path:
    """Rename a file that cannot be read, with what SQLite keeps beside it; returns its new name.

    Raises StoreError.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    target = path.with_name(f"{path.name}.broken-{stamp}")
    with _as_store_error(path), exclusive(path.with_name(path.name + ".lock")):
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{suffix}", f"{target}{suffix}")
    return target


def local_time(updated: str) -> str:
    """A time of the file, which is in UTC, as the user's clock has it."""
    try:
        return datetime.fromisoformat(updated).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return updated[:16].replace("T", " ")


def export_markdown(title: str, system: str, turns: list[Turn]) -> str:
    """A conversation as Markdown."""
    return "\n".join(_export_lines(title, system, turns)).rstrip() + "\n"


def _export_lines(title: str, system: str, turns: list[Turn]) -> Iterator[str]:
    yield f"# {title}\n"
    if system:
        yield f"> {system}\n"
    for turn in turns:
        name = "You" if turn.role == "user" else turn.model or "Assistant"
        yield f"## {name}\n\n{turn.content.rstrip()}\n"
        if turn.receipt:
            yield f"*{turn.receipt}*\n"
