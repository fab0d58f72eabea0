"""Requests in line for the model: queueing, timeouts, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request

from mobile_gguf.api.aio import STUCK_SECONDS, Job, Worker
from mobile_gguf.api.model import Model
from mobile_gguf.errors import QueueFullError

from .apis.kept_responses import KeptResponses
from .experts import ExpertMap
from .failures import ApiError, ClientLeftError, retry_after
from .metrics import Metrics
from .produce import Producer
from .settings import ServerSettings

# How long an answer may take to end once it was cut.
CUT_SECONDS = 5.0
STUCK = "the model does not come back from an earlier request that was cut: restart the server if it stays so"

T = TypeVar("T")


class HasChoice(Protocol):
    """An event of answer ``choice``; below 0 before the first."""

    @property
    def choice(self) -> int: ...


E = TypeVar("E", bound=HasChoice)


class Serving:
    """One model, its worker and what is known of both; the state of the application."""

    def __init__(self, model: Model, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        self.worker = Worker(settings.queue, model.crew)
        self.metrics = Metrics(lambda: self.worker.n_waiting, lambda: self.worker.n_running)
        self.experts = ExpertMap(model)
        self.responses = KeptResponses()
        self.started = int(time.time())
        self.closing = asyncio.Event()
        self.worker_left = False
        self._closed: asyncio.Future[bool] | None = None
        self._mean_seconds = 5.0

    def producer(self, notes: Sequence[str] = ()) -> Producer:
        """What makes the events of a request, of which ``notes`` say what is not followed."""
        producer = Producer(self.model, self.experts, self.metrics, dict(self.settings.defaults))
        producer.spent.notes += notes
        return producer

    def submit(self, produce: Callable[[Job[E]], Iterable[E]]) -> Job[E]:
        """Queue a request; raises ApiError 429 when the queue is full, 503 if nothing is answered now."""
        if self.worker.is_stuck:
            raise ApiError(503, STUCK, code="stuck", headers=retry_after(STUCK_SECONDS))
        try:
            return self.worker.submit(produce)
        except QueueFullError as error:
            wait = self._mean_seconds * (self.worker.n_waiting + 1) / max(1, self.worker.n_running)
            raise ApiError(
                429, f"{error}: try again later", code="queue_full", headers=retry_after(wait)
            ) from None

    def check_model(self, name: str | None) -> None:
        """Raise ApiError if ``name`` is another model."""
        names = self.settings.names
        # some clients leave the provider before the name, and ollama's name a variant
        if name and name not in names and _bare(name) not in names:
            raise ApiError(
                404,
                f"the model {ascii(name)[:80]} is not here: this server has {names[0]}",
                param="model",
                code="model_not_found",
            )

    def note_end(self, endpoint: str, job: Job[Any]) -> None:
        """Count a request's times, and learn from them how long another will wait."""
        seconds = time.monotonic() - job.queued_at
        self.metrics.seconds.labels(endpoint).observe(seconds)
        self.metrics.queue_seconds.labels(endpoint).observe(job.waited if job.turn else seconds)
        if job.turn:
            self._mean_seconds += 0.2 * (seconds - job.waited - self._mean_seconds)

    async def close(self) -> None:
        """Refuse what waits and let the running answer end, for as long as the settings allow.

        ``worker_left`` is true then if the model could not be stopped.
        """
        if self._closed is None:
            self.closing.set()
            close = asyncio.to_thread(self.worker.close, self.settings.grace, CUT_SECONDS)
            self._closed = asyncio.ensure_future(close)
        self.worker_left = not await asyncio.shield(self._closed)


class Events(Generic[E]):
    """The events of a job, each awaited no longer than the request may take."""

    def __init__(
        self, job: Job[E], seconds: float, on_first: Callable[[float], object] | None = None
    ) -> None:
        self._job = job
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds if seconds > 0 else None
        self._on_first = on_first

    async def next(self) -> E | None:
        """The next event, None at the end. Raises ApiError 504 when time is up, and what the job raises."""
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            event = await asyncio.wait_for(anext(self._job, None), left)
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(504, f"the answer took longer than {self._seconds:g} s", code="timeout") from None
        if event is not None and event.choice >= 0 and self._on_first is not None:
            self._on_first(time.monotonic() - self._job.queued_at)
            self._on_first = None
        return event

    async def __aiter__(self) -> AsyncIterator[E]:
        while (event := await self.next()) is not None:
            yield event


def _bare(name: str) -> str:
    return name.removeprefix("openai/").removeprefix("anthropic/").removesuffix(":latest")


async def unless_client_leaves(request: Request, awaited: Awaitable[T]) -> T:
    """The result of ``awaited``, which is cancelled if the client leaves first: ClientLeftError then."""
    work = asyncio.ensure_future(awaited)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeftError
        return work.result()
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
