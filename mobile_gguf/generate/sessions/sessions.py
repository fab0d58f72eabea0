"""When conversations go to disk: once they rest for a while, before memory drops them, at the end.

A thread writes what was left, so that who comes next does not wait for it; two conversations that take turns
write nothing until one of them rests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from mobile_gguf.engine.forks import abandon_in_children

from .prefix_cache import LEAST_TOKENS, Kept
from .session_files import Saved
from .session_store import SessionStore

_REST_SECONDS = 10.0


class Sessions:
    """The Disk of a prefix cache: texts of ``store``, for a model whose decoding thread calls all of this.

    ``finds``: whether prompts continue what is on disk; ``least_tokens``: shorter texts are not written. The
    writing thread sees nothing but texts that do not change any more; ``_changed`` guards what both see.
    """

    def __init__(self, store: SessionStore, rest_seconds: float = _REST_SECONDS) -> None:
        self.finds = True
        self.least_tokens = LEAST_TOKENS
        self._store = store
        self._rest_seconds = rest_seconds
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, Kept]] = []  # and when each may be written, the first one first
        self._writing: Kept | None = None
        self.is_open = True
        self._thread: threading.Thread | None = None
        abandon_in_children(self)

    def best(self, prompt: Sequence[int], only_big: bool) -> tuple[Saved | None, int]:
        """The text on disk that saves most of ``prompt``, and how many tokens."""
        return self._store.best(prompt, only_big) if self.finds else (None, 0)

    def take(self, saved: Saved) -> Kept | None:
        """Read it, to go on with it; None if that is not possible any more."""
        return self._store.take(saved)

    def save_as(self, name: str, kept: Kept) -> int:
        """Write a text now, under a name of somebody's. Raises MobileError, OSError."""
        return self._store.save_as(name, kept)

    def read_as(self, name: str) -> tuple[Kept, int]:
        """Read such a text. Raises MobileError, OSError."""
        return self._store.read_as(name)

    def left(self, kept: Kept) -> None:
        """Write a text later: it waits in memory."""
        if kept.is_saved or len(kept.tokens) < self.least_tokens:
            return
        with self._changed:
            self._waiting.append((time.monotonic() + self._rest_seconds, kept))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mobile-gguf-sessions", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def gone_on(self, kept: Kept) -> None:
        """Do not write a text: it will be left longer."""
        self._withdraw(kept)

    def evicted(self, kept: Kept) -> None:
        """Write a text now, unless it is written: it has no place in memory."""
        self._withdraw(kept)
        self._save(kept)

    def flush(self) -> None:
        """Write what waits, the longest text first."""
        with self._changed:
            waiting, self._waiting = [kept for _, kept in self._waiting], []
            self._changed.wait_for(lambda: self._writing is None)
        for kept in sorted(waiting, key=lambda one: -len(one.tokens)):
            self._save(kept)

    def close(self) -> None:
        """End the thread; what still waits is not written."""
        with self._changed:
            self.is_open = False
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _abandon(self) -> None:
        """In a forked child, which has neither the thread nor the model."""
        self.is_open = False
        self._changed = threading.Condition()

    def _withdraw(self, kept: Kept) -> None:
        """Take a text from those that wait. Its bytes may go when this returns."""
        with self._changed:
            self._waiting = [one for one in self._waiting if one[1] is not kept]
            self._changed.wait_for(lambda: self._writing is not kept)

    def _save(self, kept: Kept) -> None:
        if not kept.is_saved and len(kept.tokens) >= self.least_tokens:
            self._store.save(kept)
            kept.is_saved = True

    def _run(self) -> None:
        while (kept := self._next()) is not None:
            try:
                self._save(kept)
            finally:
                del kept  # or its bytes would stay until the next one
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()

    def _next(self) -> Kept | None:
        """The next text that may be written; None at the end."""
        with self._changed:
            while self.is_open:
                left = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if left is not None and left <= 0:
                    self._writing = self._waiting.pop(0)[1]
                    return self._writing
                self._changed.wait(left)
            return None
