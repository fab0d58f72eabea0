"""The folder of texts that outlive a process, shared by all models and processes.

What is in it together stays within a limit: the least worthy goes first. A file is complete or absent, and
several processes write and remove without harm: who makes room holds a lock, what is being written counts
from its first byte on, and a file that is read stays whole when its name goes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.atomic import WriterBusyError, partial_path, remove_abandoned, replacing_file
from mobile_gguf.files.lock import exclusive
from mobile_gguf.wording import why

from .prefix_cache import LEAST_TOKENS, Kept, common_length, usable
from .session_files import (
    SUFFIX,
    DamagedError,
    Fits,
    Saved,
    file_bytes,
    name_of,
    pieces_of,
    read,
    read_head,
    write,
)

_LOCK = "lock"
_ONLY_OURS = 0o600
_GIVEN = "saved-"  # before a name that somebody gave
_HOUR = 3600.0
_UNREADABLE = """some saved conversations are damaged, or of another version, and are not used: \
`mobile-gguf sessions` lists them, `mobile-gguf sessions rm` removes them"""
_OF_USE = 16  # a text of which a prompt has less than one part in so many is not read for it

Entry = Saved | None  # None: a file that cannot be read


def worth(saved: Entry, now: float) -> float:
    """What a file is kept for: its tokens, the longer nobody wanted them the fewer."""
    if saved is None:
        return 0.0
    return len(saved.tokens) / (1 + max(0.0, now - saved.used_at) / _HOUR)


class SessionFolder:
    """The files of ``folder``, which need not exist; read again only where they changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_unreadable = 0  # damaged, or of another version, when it was looked into last
        self._heads: dict[str, tuple[tuple[int, int], Saved]] = {}
        self._reading = threading.Lock()

    def entries(self) -> dict[Path, tuple[int, Entry]]:
        """Every file with its size, and what it says of itself. Raises OSError."""
        with self._reading:
            return self._entries()

    def _entries(self) -> dict[Path, tuple[int, Entry]]:
        found: dict[Path, tuple[int, Entry]] = {}
        heads, self._heads = self._heads, {}
        for path, stat in _files(self.folder, SUFFIX):
            known = heads.get(path.name)
            if known is None or known[0] != (stat.st_ino, stat.st_mtime_ns):
                try:
                    known = ((stat.st_ino, stat.st_mtime_ns), read_head(path))
                except FileNotFoundError:
                    continue
                except (DamagedError, OSError):
                    found[path] = stat.st_size, None
                    continue
            self._heads[path.name] = known
            found[path] = stat.st_size, known[1]
        self.n_unreadable = sum(one is None for _, one in found.values())
        return found

    def saved(self) -> list[Saved]:
        """Those that can be read; none of a folder that cannot."""
        with contextlib.suppress(OSError):
            return [one for _, one in self.entries().values() if one is not None]
        return []

    @property
    def n_bytes(self) -> int:
        """Of all files, also of those that are being written. Raises OSError."""
        suffixes = SUFFIX, partial_path(Path(SUFFIX)).name
        return sum(stat.st_size for suffix in suffixes for _, stat in _files(self.folder, suffix))

    def remove(self, paths: Sequence[Path]) -> int:
        """Remove files, and what killed writers left; returns the bytes that this freed. Raises OSError."""
        if not self.folder.is_dir():
            return 0
        with exclusive(self.folder / _LOCK):
            before = self.n_bytes
            for path in paths:
                path.unlink(missing_ok=True)
            remove_abandoned(self.folder)
            return before - self.n_bytes

    def write(
        self,
        name: str,
        pieces: Sequence[memoryview],
        limit_bytes: int,
        new_worth: float,
        replaced: Sequence[Path] = (),
    ) -> bool:
        """Write a file, and drop ``replaced`` and what is worth less than it where there is no room for all.

        False if it has no room. Raises MobileError, OSError.
        """
        path, n_bytes = self.folder / name, file_bytes(pieces)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as writing:
            with exclusive(self.folder / _LOCK):
                if not self._make_room(n_bytes, limit_bytes, new_worth, (path, *replaced)):
                    return False
                file = writing.enter_context(replacing_file(path, n_bytes, _ONLY_OURS))
                file.truncate(n_bytes)  # so that it counts before it is there
            write(file, pieces)
            os.fsync(file.fileno())
            with exclusive(self.folder / _LOCK):  # or who counts sees neither of its names
                writing.close()
                for old in replaced:
                    old.unlink(missing_ok=True)
        return True

    def _make_room(self, n_bytes: int, limit_bytes: int, new_worth: float, replaced: Sequence[Path]) -> bool:
        remove_abandoned(self.folder)
        entries = self.entries()
        now, left, going = time.time(), self.n_bytes, []
        values = {path: 0.0 if path in replaced else worth(one, now) for path, (_, one) in entries.items()}
        for path in sorted(values, key=values.__getitem__):
            if left + n_bytes <= limit_bytes:
                break
            if values[path] > new_worth:
                return False
            going.append(path)
            left -= entries[path][0]
        if left + n_bytes > limit_bytes:
            return False
        for path in going:
            path.unlink(missing_ok=True)
        return True


class SessionStore:
    """What of a folder continues a loaded model, and the place of what it leaves.

    ``fits`` says what a state must have been made with, ``model`` the file's path, ``n_max`` is the context.
    What is not used though it has a prompt's beginning, and what cannot be written, is told in a line, once.
    """

    def __init__(
        self,
        folder: SessionFolder,
        limit_bytes: int,
        fits: Fits,
        model: str,
        n_max: int,
        tell: Callable[[str], object],
    ) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._fits, self._model, self._n_max = fits, model, n_max
        self._tell_all = tell
        self._told: set[str] = set()
        self._unusable: set[Path] = set()

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._tell_all(text)

    def best(self, prompt: Sequence[int], only_big: bool) -> tuple[Saved | None, int]:
        """The text that saves most of ``prompt``, and how many tokens; ``only_big``: of its big rows."""
        found, most = None, 0
        other, n_other = None, 0
        saved = self._folder.saved()
        if self._folder.n_unreadable:
            self._tell(_UNREADABLE)
        for one in saved:
            n = usable(one.tokens, one.n_big if only_big else len(one.tokens), one.checkpoints, prompt)
            if n < LEAST_TOKENS or n * _OF_USE < len(one.tokens) or one.path in self._unusable:
                continue
            if one.fits != self._fits:
                if n > n_other and self._is_ours(one):
                    other, n_other = one, n
            elif n > most and len(one.tokens) <= self._n_max:
                found, most = one, n
        if other is not None and n_other > most:
            self._tell(self._misfit(other))
        return found, most

    def _is_ours(self, one: Saved) -> bool:
        return one.model == self._model or one.fits.get("model") == self._fits["model"]

    def _misfit(self, one: Saved) -> str:
        text = f"a saved conversation of {len(one.tokens)} tokens is not used: "
        if one.fits.get("model") != self._fits["model"]:
            return f"{text}{self._model} was another file then"
        names = [name for name in self._fits if one.fits.get(name) != self._fits[name]]
        if names == ["engine"]:
            return f"{text}another build of the engine made it"
        changes = [f"{name} {one.fits.get(name)}, now {self._fits[name]}" for name in names]
        return f"{text}it was made with {'; '.join(changes)}"

    def take(self, saved: Saved) -> Kept | None:
        """The text, to go on with it; None if its file is gone or damaged."""
        try:
            head, kept = read(saved.path)
            if head.fits != self._fits:
                raise DamagedError
            os.utime(saved.path)
        except FileNotFoundError:
            self._unusable.add(saved.path)
            return None
        except (DamagedError, OSError):
            self._unusable.add(saved.path)
            self._tell(f"a saved conversation is damaged and was dropped: {saved.path}")
            with contextlib.suppress(OSError):
                saved.path.unlink(missing_ok=True)
            return None
        return kept

    def save_as(self, name: str, kept: Kept) -> int:
        """Write a text under a name that somebody gave; returns its bytes. Raises MobileError, OSError."""
        pieces = pieces_of(self._fits, self._model, kept)
        if not self._folder.write(_GIVEN + name + SUFFIX, pieces, self._limit_bytes, float("inf")):
            raise MobileError(
                f"{name} is not saved: it takes {file_bytes(pieces)} bytes, and all saved conversations may "
                f"take {self._limit_bytes}: a larger --session-cache has room for it"
            )
        return file_bytes(pieces)

    def read_as(self, name: str) -> tuple[Kept, int]:
        """A text by such a name, and its bytes. Raises MobileError if it is none that fits, OSError."""
        try:
            saved, kept = read(self._folder.folder / (_GIVEN + name + SUFFIX))
        except FileNotFoundError:
            raise UsageError(f"{name} is not there: save a slot under this name first") from None
        except DamagedError:
            raise MobileError(f"{name} is damaged, or of another version") from None
        if saved.fits != self._fits:
            raise MobileError(self._misfit(saved))
        if len(kept.tokens) > self._n_max:
            raise MobileError(f"{name} has {len(kept.tokens)} tokens, and the context {self._n_max}")
        return kept, saved.n_bytes

    def save(self, kept: Kept) -> None:
        """Write a text, in place of those that it has all of; one that is there already is found longer."""
        try:
            self._save(kept)
        except WriterBusyError:
            pass  # the same text, by another process
        except (MobileError, OSError) as error:
            where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            self._tell(f"a conversation is not kept for the next start: {where}{why(error)}")

    def _save(self, kept: Kept) -> None:
        replaced = []
        for one in self._folder.saved():
            if one.fits != self._fits:
                continue
            n = len(one.tokens)
            has_all = usable(one.tokens, n, one.checkpoints, [*kept.tokens, -1]) == len(kept.tokens)
            if has_all and one.n_big >= kept.n_big:
                try:
                    os.utime(one.path)
                except FileNotFoundError:  # another process has just made room with it
                    continue
                return
            if one.path.name.startswith(_GIVEN):
                continue  # somebody wants it as it is
            if one.n_big <= kept.n_big and common_length(one.tokens, kept.tokens) == n:
                replaced.append(one.path)
        pieces = pieces_of(self._fits, self._model, kept)
        while file_bytes(pieces) > self._limit_bytes // 2 and kept.checkpoints:
            # the oldest point to go back to is the one that is wanted last
            kept = replace(kept, checkpoints=kept.checkpoints[1:])
            pieces = pieces_of(self._fits, self._model, kept)
        name = name_of(self._fits, kept.tokens)
        self._folder.write(name, pieces, self._limit_bytes, float(len(kept.tokens)), replaced)


def _files(folder: Path, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    if S_ISREG(stat.st_mode):  # what else lies there is not ours
                        yield folder / entry.name, stat
