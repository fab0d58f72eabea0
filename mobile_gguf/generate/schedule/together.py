"""What answers that are made at once need beside decodes: made for all of them before the next one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from greenlet import getcurrent

from mobile_gguf.errors import MobileError

from ..context.wish import Task

Request = TypeVar("Request")
Result = TypeVar("Result")


class _Waiting(NamedTuple):
    task: Task
    work: Callable[[Sequence[Any]], Sequence[Any]]
    request: Any


class Together:
    """Work that answers share; unless it ``is_shared`` each has its own done at once."""

    def __init__(self, *, is_shared: bool) -> None:
        self._is_shared = is_shared
        self._waiting: list[_Waiting] = []

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    def run(self, work: Callable[[Sequence[Request]], Sequence[Result]], request: Request) -> Result:
        """What ``work`` says of a request; it is called once with those of all answers that get so far."""
        task = getcurrent()
        if not self._is_shared or not isinstance(task, Task):
            return work([request])[0]
        self._waiting.append(_Waiting(task, work, request))
        assert task.parent is not None
        return task.parent.switch()

    def found(self) -> Iterator[tuple[Task, BaseException | None, tuple[Any, ...]]]:
        """Do what is asked for; tasks that may go on, each with an error or what was said of its request."""
        waiting, self._waiting = self._waiting, []
        for work in dict.fromkeys(one.work for one in waiting):
            own = [one for one in waiting if one.work == work]
            try:
                results = work([one.request for one in own])
            except BaseException as error:  # it belongs to those whose work it was
                for one in own:
                    # each has one of its own, since its answer so far is noted on it
                    yield one.task, copy.copy(error) if isinstance(error, MobileError) else error, ()
            else:
                for one, result in zip(own, results, strict=True):
                    yield one.task, None, (result,)

    def leave(self) -> list[Task]:
        """The tasks that wait, for which nothing is done."""
        waiting, self._waiting = self._waiting, []
        return [one.task for one in waiting]
