"""What answers need that is no decode, on a thread of its own while others go on: templates, grammars."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

from ..context.wish import Task

Result = TypeVar("Result")

# Who has nothing to decode looks again after so long whether there is somebody new.
_SECONDS = 0.02


class Aside:
    """One thread, made when it is first wanted, that does one such thing at a time; its caller is a task."""

    def __init__(self) -> None:
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._running: list[tuple[Task, concurrent.futures.Future[Any]]] = []

    @property
    def is_busy(self) -> bool:
        return bool(self._running)

    def run(self, task: Task, work: Callable[[], Result]) -> Result:
        """Have ``task`` wait for what ``work`` returns or raises."""
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "mobile-gguf-aside")
        future = self._thread.submit(work)
        self._running.append((task, future))
        assert task.parent is not None
        task.parent.switch()
        return future.result()

    def done(self, is_wanted: bool) -> list[Task]:
        """The tasks that may go on; ``is_wanted``: wait for one, a little."""
        if not self._running:
            return []
        futures = [future for _, future in self._running]
        concurrent.futures.wait(futures, _SECONDS if is_wanted else 0, concurrent.futures.FIRST_COMPLETED)
        ended = [(task, future) for task, future in self._running if future.done()]
        self._running = [one for one in self._running if one not in ended]
        return [task for task, _ in ended]

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
