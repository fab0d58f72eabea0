"""A request's way to its answer, whole or streamed, whichever API it came by and however it ends.

What an API calls things is its form's: the frames of a stream, the object of a whole answer, its errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import anyio
from fastapi import Body, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent

from mobile_gguf.api.aio import Job

from .failures import ApiError, ErrorBody, as_api_error, printable
from .produce import Event, Producer
from .requests import ChatRequest, unknown_names
from .serving import CUT_SECONDS, Events, HasChoice, Serving, unless_client_leaves

# A proxy gives up on a connection that says nothing while a long prompt is computed.
PING_SECONDS = 10
# Who waits in line for longer gets the headers of its stream before its turn.
HEADERS_SECONDS = 2.0
# How often it is looked at who has got how far in the line.
PLACE_SECONDS = 0.5
NOTES_HEADER = "X-Mobile-Gguf-Note"
_NOTES_LENGTH, _NAME_LENGTH = 1000, 80
EVENT_STREAM, NDJSON = "text/event-stream", "application/x-ndjson"

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the request cannot be meant"},
    401: {"model": ErrorBody, "description": "no API key, or a wrong one"},
    403: {"model": ErrorBody, "description": "a name that this server does not answer to"},
    404: {"model": ErrorBody, "description": "another model"},
    413: {"model": ErrorBody, "description": "the request is too large"},
    429: {"model": ErrorBody, "description": "the queue is full; Retry-After says when to come again"},
    500: {"model": ErrorBody, "description": "the engine failed"},
    503: {"model": ErrorBody, "description": "the server is shutting down"},
    504: {"model": ErrorBody, "description": "the answer took too long"},
}
STREAM: dict[str, Any] = {
    "description": "the answer; server-sent events with `stream`",
    "content": {EVENT_STREAM: {}},
}
JsonBody = Body(media_type="application/json")

Frame = ServerSentEvent | bytes
E = TypeVar("E", bound=HasChoice)
T = TypeVar("T")


class Form(Protocol):
    """How one API says an answer; made for one request, and told what happens in its order."""

    media_type: str  # of a stream

    def whole(self, events: list[Event], usage: dict[str, Any], /) -> dict[str, Any]: ...
    def so_far(self, events: list[Event], /) -> dict[str, Any]: ...  # what is said beside an error
    def begun(self, usage: dict[str, Any], /) -> Iterable[Frame]: ...  # the prompt is known
    def frames(self, event: Event, /) -> Iterable[Frame]: ...
    def ended(self, usage: dict[str, Any], /) -> Iterable[Frame]: ...
    def failed(self, error: ApiError, usage: dict[str, Any], /) -> Iterable[Frame]: ...
    def ping(self) -> ServerSentEvent | None: ...  # None: a comment


def sse(data: dict[str, Any], event: str | None = None) -> ServerSentEvent:
    """A frame of a stream of server-sent events."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return ServerSentEvent(text, event=event, sep="\n")


def ndjson(data: dict[str, Any]) -> bytes:
    """A frame of a stream of lines of JSON."""
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True)
class Ask:
    """What is asked of the model: events for a request, and how they are to be told."""

    producer: Producer
    form: Form
    produce: Callable[[Job[Event]], Generator[Event, None, None]]
    stream: bool
    every_usage: bool = False  # the usage so far with each event


async def answer(request: Request, ask: Ask) -> Response:
    """The answer to a request. Raises ApiError, and what the model raises, where it has a status."""
    serving: Serving = request.app.state.serving
    endpoint = endpoint_of(request)

    def produce(job: Job[Event]) -> Iterator[Event]:
        return _watched(job, ask)

    job = serving.submit(produce)
    events = Events(job, serving.settings.timeout, serving.metrics.first_token.observe)
    is_streamed = False
    first = asyncio.ensure_future(events.next())
    try:
        # What cannot be answered is known when the first event comes, and has a status of its own; who waits
        # in line for a stream is sent its headers and pings meanwhile, and such an error as an event.
        soon = HEADERS_SECONDS if ask.stream else None
        await unless_client_leaves(request, asyncio.wait({first}, timeout=soon))
        if first.done():
            first.result()
        if ask.stream:
            is_streamed = True
            return _streamed(serving, job, ask, _stream(serving, job, first, events, ask, endpoint))
        found = await unless_client_leaves(request, _collect(events, ask.form))
        return JSONResponse(ask.form.whole(found, _usage(ask, job)), headers=_notes(ask.producer))
    except BaseException:
        job.cancel()
        raise
    finally:
        if not is_streamed:
            first.cancel()
            serving.note_end(endpoint, job)


def _streamed(serving: Serving, job: Job[Event], ask: Ask, frames: AsyncIterator[Frame]) -> Response:
    # The events end by themselves on shutdown: the job is cut when its time is over.
    grace = serving.settings.grace + CUT_SECONDS + 2
    form = ask.form

    async def left(_message: object) -> None:  # maybe before the stream has begun, and can end
        job.cancel()

    def ping() -> ServerSentEvent:
        return form.ping() or ServerSentEvent(comment="ping", sep="\n")

    return EventSourceResponse(
        frames,
        headers=_notes(ask.producer),
        media_type=form.media_type,
        ping=PING_SECONDS if form.media_type == EVENT_STREAM else 0,
        ping_message_factory=ping,
        sep="\n",
        client_close_handler_callable=left,
        shutdown_event=anyio.Event(),
        shutdown_grace_period=grace,
    )


def _watched(job: Job[Event], ask: Ask) -> Iterator[Event]:
    """The events, with the usage so far if it was asked for; runs in the worker's thread."""
    with closing(ask.produce(job)) as events:
        for event in events:
            yield replace(event, usage=_usage(ask, job)) if ask.every_usage else event


async def _collect(events: Events[Event], form: Form) -> list[Event]:
    """All events. What fails after words were made has them with it: they were paid for."""
    found: list[Event] = []
    try:
        async for event in events:
            found.append(event)
    except Exception as error:
        failed = as_api_error(error)
        failed.so_far = form.so_far(found) if found else {}
        raise failed from error
    return found


async def _stream(
    serving: Serving,
    job: Job[Event],
    first: asyncio.Future[Event | None],
    events: Events[Event],
    ask: Ask,
    endpoint: str,
) -> AsyncIterator[Frame]:
    ended = False
    form = ask.form
    try:
        if form.media_type == EVENT_STREAM:
            async for place in _places(job, first):
                yield ServerSentEvent(comment=f"place {place}", sep="\n")
        await first  # says only that the prompts are known
        for frame in form.begun(_usage(ask, job)):
            yield frame
        async for event in events:
            for frame in form.frames(event):
                yield frame
        ended = True
        for frame in form.ended(_usage(ask, job)):
            yield frame
    except Exception as error:  # the status is out already: the stream says what happened
        ended = True
        for frame in form.failed(as_api_error(error), _usage(ask, job)):
            yield frame
    finally:
        first.cancel()
        job.cancel()
        serving.note_end(endpoint, job)
        if not ended:
            serving.metrics.cancelled.inc()


async def _places(job: Job[Event], first: asyncio.Future[Any]) -> AsyncIterator[int]:
    """A job's place in line each time it is another, until its turn, which is 0, or the ``first`` event."""
    told = 0
    while not first.done():
        place = job.place
        if place != told:
            yield place
            told = place
        if not place:
            return
        await asyncio.wait({first}, timeout=PLACE_SECONDS)


@dataclass(frozen=True)
class Value(Generic[T]):
    """One result of what is done in line, and no answer."""

    value: T
    choice: int = 0


async def in_line(request: Request, produce: Callable[[Job[E]], Iterable[E]]) -> list[E]:
    """What the model gives where it is asked for no answer, in the same line as answers.

    Raises ApiError, ClientLeftError, and what ``produce`` raises, which runs in the worker's thread.
    """
    serving: Serving = request.app.state.serving
    job = serving.submit(produce)
    events = Events(job, serving.settings.timeout)

    async def collect() -> list[E]:
        return [event async for event in events]

    try:
        return await unless_client_leaves(request, collect())
    except BaseException:
        job.cancel()
        raise
    finally:
        serving.note_end(endpoint_of(request), job)


async def one_in_line(request: Request, work: Callable[[Job[Value[T]]], T]) -> T:
    """One value that the model gives, in line."""

    def produce(job: Job[Value[T]]) -> Iterator[Value[T]]:
        yield Value(work(job))

    return (await in_line(request, produce))[0].value


async def count_prompt(request: Request, serving: Serving, asked: ChatRequest) -> int:
    """The tokens of a chat's prompt, which is made in line."""
    producer = serving.producer()
    return await one_in_line(request, lambda _job: len(producer.chat_prompt(asked)))


def endpoint_of(request: Request) -> str:
    """What metrics call the endpoint: no client can make up more of them than there are."""
    return getattr(request.scope.get("route"), "path", request.url.path)


def check_names(serving: Serving, body: BaseModel, also: frozenset[str] = frozenset()) -> list[str]:
    """A note of what a request names that nobody knows; ApiError where the server is strict.

    ``also``: names that one API has besides, and that change little.
    """
    unknown = [name for name in unknown_names(body) if name not in also]
    if unknown and serving.settings.strict:
        raise ApiError(
            400, f"unrecognized request argument: {unknown[0]}", param=unknown[0], code="unknown_parameter"
        )
    shown = ", ".join(printable(name)[:_NAME_LENGTH] for name in unknown)
    return [f"not known here and left out: {shown}"] if unknown else []


def note_headers(notes: Sequence[str]) -> dict[str, str]:
    """The header that says what of a request was not followed; a stream need not have a usage."""
    text = printable("; ".join(notes)).encode("ascii", "backslashreplace").decode()
    text = text[:_NOTES_LENGTH].strip()  # a header may not begin or end by a space
    return {NOTES_HEADER: text} if text else {}


def _notes(producer: Producer) -> dict[str, str]:
    return note_headers(producer.spent.notes)


def _usage(ask: Ask, job: Job[Event]) -> dict[str, Any]:
    line = {"number": job.number, "turn": job.turn, "wait_ms": job.waited * 1e3}
    return ask.producer.spent.so_far().usage() | {"queue": line}
