"""The API for asyncio: one thread that owns the model, a queue before it, and answers to await.

A model makes as many answers at once as it was loaded for, and others wait in line, first come first served.
Whoever leaves, by cancelling the task or closing the stream, frees the place: a waiting request is taken out
of the line, a running one stops within a token, and the others go on.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from mobile_gguf.engine.forks import abandon_in_children, forked
from mobile_gguf.errors import ModelBusyError, QueueFullError
from mobile_gguf.generate.schedule.crew import Alone, Crew
from mobile_gguf.options import GenerateOptions, LoadOptions, takes

if TYPE_CHECKING:
    import os

    from mobile_gguf.generate.answer.answer import Chunk, Reply

    from .embedding import Embedding
    from .messages import Messages
    from .model import Model

Item = TypeVar("Item")

# An answer stops within an operation; reading experts from a slow disk may take seconds.
STUCK_SECONDS = 30.0


class _End:
    """What comes after a job's last item; ``error`` is why, if it failed."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Job(Generic[Item]):
    """Work in the worker's queue: ``async for`` gives what it yields, and ``cancel`` ends it.

    Iterating raises what the work raised, ModelBusyError if the worker was closed before its turn.
    """

    def __init__(self, worker: Worker, produce: Callable[[Job[Item]], Iterable[Item]]) -> None:
        self._worker = worker
        self._produce = produce
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item | _End] = asyncio.Queue()
        self._cancelled = threading.Event()
        self.cancelled_at = 0.0  # when it was first asked to end; 0 if it was not
        self.queued_at = time.monotonic()
        self.number = 0  # which job of its worker it is, from 1, by coming
        self.turn = 0  # and by being run; 0 while it waits
        self.waited = 0.0

    def cancel(self) -> None:
        """Take the job out of the queue, or have it stop soon; nothing if it has ended. For any thread."""
        self.cancelled_at = self.cancelled_at or time.monotonic()
        self._cancelled.set()
        self._worker.forget(self)

    def is_cancelled(self) -> bool:
        """Whether the job should end: the ``should_stop`` of the answers that it makes."""
        return self._cancelled.is_set()

    @property
    def place(self) -> int:
        """The place in the queue, 1 for the next whose turn it is; 0 once it has had its turn, or left."""
        return self._worker.place_of(self)

    def __aiter__(self) -> Job[Item]:
        return self

    async def __anext__(self) -> Item:
        item = await self._items.get()
        if isinstance(item, _End):
            self._items.put_nowait(item)
            if item.error is not None:
                raise item.error
            raise StopAsyncIteration
        return item

    # the worker's side

    def run(self) -> None:
        """Do the work in this thread, handing every item over."""
        try:
            items = self._produce(self)
            try:
                for item in items:
                    if self.is_cancelled():
                        raise ModelBusyError(self._worker.why_cut())
                    self._put(item)
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
        except BaseException as error:  # it belongs to whoever waits for the job
            self.fail(error)
        else:
            self.fail(None)

    def fail(self, error: BaseException | None) -> None:
        """End the job; with an error, iterating it raises that."""
        self._put(_End(error))

    def _put(self, item: Item | _End) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            self._cancelled.set()


class Worker:
    """One thread that begins jobs in the order they came; at most ``queue`` wait, None: any number.

    The ``crew`` runs them, as many at once as it makes answers.
    """

    def __init__(self, queue: int | None = None, crew: Crew | None = None) -> None:
        self._limit = queue
        self._crew = crew if crew is not None else Alone()
        self._jobs: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._running: tuple[Job[Any], ...] = ()
        self._closed = self._is_forked = False
        self._in_hurry = threading.Event()
        self._n_jobs = self._n_turns = 0
        self._thread = threading.Thread(target=self._work, name="mobile-gguf-worker", daemon=True)
        self._thread.start()
        abandon_in_children(self)

    def _abandon(self) -> None:
        """In a forked child, which has no such thread: jobs are refused."""
        self._is_forked = True
        self._changed = threading.Condition()
        self._jobs.clear()

    @property
    def n_waiting(self) -> int:
        return len(self._jobs)

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def is_busy(self) -> bool:
        return bool(self._running)

    def submit(self, produce: Callable[[Job[Item]], Iterable[Item]]) -> Job[Item]:
        """Queue ``produce``, which is called with its Job in the worker's thread.

        Raises QueueFullError, and ModelBusyError after ``close``.
        """
        if self._is_forked:
            raise forked()
        job = Job(self, produce)
        with self._changed:
            if self._closed:
                raise ModelBusyError("the model is being closed: it takes no more requests")
            # the first of those that came have their turn, even where the thread has not looked yet
            n_others = len(self._jobs) + len(self._running)
            if self._limit is not None and n_others >= self._crew.most + self._limit:
                raise QueueFullError(f"{len(self._jobs)} requests are waiting for the model already")
            self._n_jobs += 1
            job.number = self._n_jobs
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def forget(self, job: Job[Any]) -> None:
        """Take a job out of the queue if it is still there."""
        with self._changed:
            if job not in self._jobs:
                return
            self._jobs.remove(job)
        job.fail(ModelBusyError("the request was cancelled while it waited"))

    def place_of(self, job: Job[Any]) -> int:
        """``Job.place``."""
        with self._changed:
            return self._jobs.index(job) + 1 if job in self._jobs else 0

    def why_cut(self) -> str:
        """What is to be said of a running job that was cancelled."""
        reason = "the model is being closed" if self._closed else "the request was cancelled"
        return f"the answer was cut: {reason}"

    @property
    def is_stuck(self) -> bool:
        """Whether a running job was told to end ``STUCK_SECONDS`` ago and has not."""
        told = [job.cancelled_at for job in self._running if job.cancelled_at]
        return bool(told) and time.monotonic() - min(told) > STUCK_SECONDS

    def cancel_running(self) -> None:
        """Have running jobs stop soon, and a ``close`` that waits for them not wait."""
        self._in_hurry.set()
        for job in self._running:
            job.cancel()

    def close(self, grace: float = 0.0, patience: float | None = None) -> bool:
        """Refuse what waits and end the thread; running jobs are cancelled after ``grace`` seconds.

        Returns whether the thread has ended: one that does not end for ``patience`` seconds more, None: any
        number, is left alone, and whoever waits for its jobs gets an error.
        """
        with self._changed:
            self._closed = True
            refused = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in refused:
            job.fail(ModelBusyError("the model is being closed: the request did not get its turn"))
        until = time.monotonic() + grace
        while self._thread.is_alive() and not self._in_hurry.is_set() and time.monotonic() < until:
            self._thread.join(min(0.05, grace))
        self.cancel_running()
        self._thread.join(patience)
        if not self._thread.is_alive():
            return True
        for job in self._running:
            job.fail(ModelBusyError(self.why_cut()))
        return False

    def _work(self) -> None:
        while (jobs := self._begin()) or self._running:
            for job in jobs:
                self._crew.spawn(functools.partial(self._run, job))
            self._crew.advance()

    def _begin(self) -> list[Job[Any]]:
        """The jobs whose turn it is; waits for one while none runs, and returns none then once closed."""
        begun: list[Job[Any]] = []
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._jobs or self._closed)
            while self._jobs and len(self._running) < self._crew.most:
                job = self._jobs.popleft()
                begun.append(job)
                self._running = (*self._running, job)
                self._n_turns += 1
                job.turn = self._n_turns
                job.waited = time.monotonic() - job.queued_at
        return begun

    def _run(self, job: Job[Any]) -> None:
        try:
            job.run()
        finally:
            self._running = tuple(one for one in self._running if one is not job)


@takes(LoadOptions)
async def load(
    model: str | os.PathLike[str],
    *,
    progress: Callable[[str, float], None] | None = None,
    queue: int | None = None,
    **options: Any,
) -> AsyncModel:
    """Load a model, as ``mobile_gguf.load`` does, without blocking the event loop."""
    from .model import load as load_model

    loaded = await asyncio.to_thread(lambda: load_model(model, progress=progress, **options))
    return AsyncModel(loaded, queue=queue)


class AsyncModel:
    """A Model to await: any number of tasks may ask at once; answers begin in order, ``parallel`` at once.

    ``queue`` bounds how many may wait; one more gets a QueueFullError. Cancelling a task, or closing a
    stream, stops its answer within a token. Made by ``load`` here, or around a Model that nobody else uses.
    """

    def __init__(self, model: Model, *, queue: int | None = None) -> None:
        self.model = model
        self.worker = Worker(queue, model.crew)

    @takes(GenerateOptions)
    async def generate(self, prompt: str | Sequence[int], **options: Any) -> Reply:
        """Continue ``prompt`` and return the whole Reply; raises as ``Model.generate`` does."""
        return await self._whole(lambda stop: self.model.generate(prompt, **_heeding(stop, options)))

    @takes(GenerateOptions)
    async def chat(self, messages: Messages, **options: Any) -> Reply:
        """Answer ``messages`` and return the whole Reply; raises as ``Model.chat`` does."""
        return await self._whole(lambda stop: self.model.chat(messages, **_heeding(stop, options)))

    @takes(GenerateOptions)
    def stream(self, prompt: str | Sequence[int], **options: Any) -> AsyncGenerator[Chunk, None]:
        """Continue ``prompt``, yielding a Chunk per token; raises as ``Model.stream`` does."""
        return self._chunks(lambda stop: self.model.stream(prompt, **_heeding(stop, options)))

    @takes(GenerateOptions)
    def stream_chat(self, messages: Messages, **options: Any) -> AsyncGenerator[Chunk, None]:
        """Answer ``messages``, yielding a Chunk per token; raises as ``Model.stream_chat`` does."""
        return self._chunks(lambda stop: self.model.stream_chat(messages, **_heeding(stop, options)))

    async def embed(self, text: str | Sequence[int], *, pooling: str | None = None) -> Embedding:
        """The vector of ``text``; raises as ``Model.embed`` does."""
        return await self._whole(lambda stop: self.model.embed(text, pooling=pooling, should_stop=stop))

    async def close(self) -> None:
        """Stop what runs, refuse what waits, and free the model."""
        await asyncio.to_thread(self.worker.close)
        self.model.close()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            "an AsyncModel holds a loaded file and cannot be copied or pickled: load it again instead"
        )

    async def __aenter__(self) -> AsyncModel:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def _whole(self, ask: Callable[[Callable[[], bool]], Item]) -> Item:
        def produce(job: Job[Item]) -> Iterator[Item]:
            yield ask(job.is_cancelled)

        job = self.worker.submit(produce)
        try:
            return await anext(job)
        finally:
            job.cancel()

    async def _chunks(
        self, ask: Callable[[Callable[[], bool]], Iterable[Chunk]]
    ) -> AsyncGenerator[Chunk, None]:
        job = self.worker.submit(lambda job: ask(job.is_cancelled))
        try:
            async for chunk in job:
                yield chunk
        finally:
            job.cancel()


def _heeding(cancelled: Callable[[], bool], options: dict[str, Any]) -> dict[str, Any]:
    own = options.get("should_stop")
    return options | {"should_stop": (lambda: cancelled() or own()) if own is not None else cancelled}
