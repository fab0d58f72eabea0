"""Which servers and chats of this user are running: a record and a lock file for each, in a folder of theirs.

A process holds its lock as long as it lives. A record whose lock is free, and whose process is gone, is
stale, and whoever looks removes it. A number may belong to another process by now, so that a process is known
by its number and the time it was started at.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError

from .atomic import complete_or_absent
from .lock import try_hold
from .paths import runtime_dir

SERVE, CHAT = "serve", "chat"
# How old what is told may be.
_SECONDS = 2.0
_OPEN = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True)
class Running:
    """A process: its number, when it was started as the system counts, and what it told of itself."""

    pid: int
    started: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether the process of this number is certainly the one that wrote the record."""
        return bool(self.started) and start_of(self.pid) == self.started

    @property
    def memory_bytes(self) -> int | None:
        """What it has in memory now; None where the system does not say."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError, AttributeError):
            return None


def start_of(pid: int) -> str:
    """When a process was started, in ticks since the system was; empty if there is none, or nobody says."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # a name may hold anything
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


@contextlib.contextmanager
def announced(kind: str, told: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """While the block runs, others can see this process, with what ``told`` says every other second.

    ``told`` is called in another thread. A system that refuses costs only that nobody sees it.
    """
    folder, pid = runtime_dir(), os.getpid()
    record, lock = folder / f"{pid}.json", folder / f"{pid}.lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(lock, _OPEN | os.O_CREAT, 0o600)
    except OSError:
        yield
        return
    ends, writing = threading.Event(), threading.Lock()
    last: dict[str, Any] | None = None

    def write() -> None:
        nonlocal last
        with contextlib.suppress(OSError, MobileError), writing:
            facts = told()
            if ends.is_set() or facts == last:
                return
            last = facts
            with complete_or_absent(record) as partial:
                partial.touch(0o600)
                text = {"pid": pid, "started": start_of(pid), "kind": kind, "facts": facts}
                partial.write_text(json.dumps(text), encoding="utf-8")

    def follow() -> None:
        while not ends.wait(_SECONDS):
            write()

    try:
        try_hold(held)
        write()
        threading.Thread(target=follow, name="mobile-gguf-announce", daemon=True).start()
        yield
    finally:
        ends.set()
        with writing:
            _unlink(record)
        os.close(held)
        _unlink(lock)  # now, since Windows keeps files that are open


def running() -> list[Running]:
    """The processes that run now, the oldest record first; stale records are removed."""
    found = []
    try:
        records = sorted(runtime_dir().glob("*.json"), key=lambda path: path.stat().st_ctime)
    except OSError:
        return []
    for path in records:
        one = _read(path)
        if _is_held(path) or (one is not None and one.is_known):
            found += [one] if one is not None else []
        else:
            _remove(path)
    return found


def _read(path: Path) -> Running | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        facts = said["facts"]
        if not isinstance(facts, dict) or str(said["pid"]) != path.stem:
            return None
        return Running(int(said["pid"]), str(said["started"]), str(said["kind"]), facts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_held(path: Path) -> bool:
    """Whether another process has the lock of a record."""
    try:
        descriptor = os.open(path.with_suffix(".lock"), _OPEN)
    except OSError:
        return False
    try:
        return not try_hold(descriptor)
    finally:
        os.close(descriptor)


def _remove(record: Path) -> None:
    _unlink(record)
    _unlink(record.with_suffix(".lock"))


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
