"""Who makes answers: one after another, or several at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Crew(Protocol):
    """Answers in the making, ``n_running`` of ``most`` that there may be at present; all of one thread.

    ``spawn`` begins one, which goes on with each ``advance``. What its work raises it has to tell itself.
    ``at_work`` may be asked from any thread: answers in the making, also those that nobody spawned, and how
    many of them still have their prompt computed.
    """

    n_running: int

    @property
    def most(self) -> int: ...
    @property
    def at_work(self) -> tuple[int, int]: ...
    @property
    def joins(self) -> bool: ...  # whether who asks is one of several, and not the first
    @property
    def iteration_ms(
        self,
    ) -> tuple[float, float] | None: ...  # what decodes were to take with drafts, and took
    def spawn(self, work: Callable[[], object]) -> None: ...
    def advance(self) -> None: ...
    def stop(self) -> None: ...  # ends all


class Alone:
    """A crew of one: an answer is made to its end as soon as it is begun."""

    n_running = 0
    most = 1
    at_work = (0, 0)
    joins = False
    iteration_ms = None

    def spawn(self, work: Callable[[], object]) -> None:
        work()

    def advance(self) -> None:
        """Nothing is waiting."""

    def stop(self) -> None:
        """Nothing is running."""
