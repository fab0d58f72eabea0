"""``/v1/chat/completions`` and ``/v1/completions``, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from mobile_gguf.api.aio import Job

from .answers import Completion, Renderer
from .failures import ErrorBody, as_api_error
from .produce import Event, Producer
from .requests import ChatRequest, CompletionRequest, Generation
from .serving import CUT_SECONDS, ClientLeftError, Events, Serving, unless_client_leaves

# A proxy gives up on a connection that says nothing while a long prompt is computed.
PING_SECONDS = 10
# Who waits in line for longer gets the headers of its stream before its turn.
HEADERS_SECONDS = 2.0
# How often it is looked at who has got how far in the line.
PLACE_SECONDS = 0.5
NOTES_HEADER = "X-Mobile-Gguf-Note"
_NOTES_LENGTH = 1000

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
_STREAM = {
    "description": "the answer; server-sent events with `stream`",
    "content": {"text/event-stream": {}},
}

router = APIRouter(prefix="/v1")
JsonBody = Body(media_type="application/json")


@router.post(
    "/chat/completions", response_model=Completion, responses=ERRORS | {200: _STREAM}, summary="Answer a chat"
)
async def chat_completions(request: Request, body: Annotated[ChatRequest, JsonBody]) -> Response:
    """Answer messages, with tools or by a JSON schema if asked."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    producer = serving.producer()
    renderer = Renderer(serving.settings.names[0], chat=True, with_logprobs=bool(body.logprobs))
    return await _answer(
        request, body, producer, renderer, lambda job: _watched(job, body, producer, producer.chat(job, body))
    )


@router.post(
    "/completions", response_model=Completion, responses=ERRORS | {200: _STREAM}, summary="Continue a text"
)
async def completions(request: Request, body: Annotated[CompletionRequest, JsonBody]) -> Response:
    """Continue one or several prompts."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    producer = serving.producer()
    renderer = Renderer(serving.settings.names[0], chat=False, with_logprobs=body.logprobs is not None)
    return await _answer(
        request,
        body,
        producer,
        renderer,
        lambda job: _watched(job, body, producer, producer.completion(job, body)),
    )


async def _answer(
    request: Request,
    body: Generation,
    producer: Producer,
    renderer: Renderer,
    produce: Callable[[Job[Event]], Iterable[Event]],
) -> Response:
    serving: Serving = request.app.state.serving
    endpoint = request.url.path
    job = serving.submit(produce)
    events = Events(job, serving.settings.timeout, serving.metrics.first_token.observe)

    is_streamed = False
    first = asyncio.ensure_future(events.next())
    try:
        # What cannot be answered is known when the first event comes, and has a status of its own; who waits
        # in line for a stream is sent its headers and pings meanwhile, and such an error as an event.
        soon = HEADERS_SECONDS if body.stream else None
        await unless_client_leaves(request, asyncio.wait({first}, timeout=soon))
        if first.done():
            first.result()
        if body.stream:
            is_streamed = True
            include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            stream = _stream(serving, job, first, events, renderer, producer, include_usage, endpoint)
            # The events end by themselves on shutdown: the job is cut when its time is over.
            grace = serving.settings.grace + CUT_SECONDS + 2

            async def left(_message: object) -> None:  # maybe before the stream has begun, and can end
                job.cancel()

            return EventSourceResponse(
                stream,
                headers=_notes(producer),
                ping=PING_SECONDS,
                sep="\n",
                client_close_handler_callable=left,
                shutdown_event=anyio.Event(),
                shutdown_grace_period=grace,
            )
        whole = await unless_client_leaves(request, _collect(events, renderer))
        body_of_all = renderer.whole(whole, _usage(producer, job))
        return JSONResponse(body_of_all, headers=_notes(producer))
    except ClientLeftError:
        job.cancel()
        serving.metrics.cancelled.inc()
        return Response(status_code=499)
    except BaseException:
        job.cancel()
        raise
    finally:
        if not is_streamed:
            first.cancel()
            serving.note_end(endpoint, job)


def _notes(producer: Producer) -> dict[str, str]:
    """The header that says what of a request was not followed; a stream need not have a usage."""
    text = "; ".join(producer.spent.notes).encode("ascii", "backslashreplace").decode()
    return {NOTES_HEADER: text[:_NOTES_LENGTH]} if text else {}


def _usage(producer: Producer, job: Job[Event]) -> dict[str, Any]:
    line = {"number": job.number, "turn": job.turn, "wait_ms": job.waited * 1e3}
    return producer.spent.so_far().usage() | {"queue": line}


def _watched(
    job: Job[Event], body: Generation, producer: Producer, events: Generator[Event, None, None]
) -> Iterator[Event]:
    """The events, with the usage so far if it was asked for; runs in the worker's thread."""
    options = body.stream_options
    wanted = bool(body.stream and options is not None and options.continuous_usage_stats)
    with closing(events):
        for event in events:
            yield replace(event, usage=_usage(producer, job)) if wanted else event


async def _collect(events: Events[Event], renderer: Renderer) -> list[Event]:
    """All events. What fails after words were made has them with it: they were paid for."""
    found: list[Event] = []
    try:
        async for event in events:
            found.append(event)
    except Exception as error:
        failed = as_api_error(error)
        failed.choices = renderer.choices(found)
        raise failed from error
    return found


async def _stream(
    serving: Serving,
    job: Job[Event],
    first: asyncio.Future[Event | None],
    events: Events[Event],
    renderer: Renderer,
    producer: Producer,
    include_usage: bool,
    endpoint: str,
) -> AsyncIterator[ServerSentEvent]:
    ended = False
    try:
        async for place in _places(job, first):
            yield ServerSentEvent(comment=f"place {place}", sep="\n")
        await first  # says only that the prompts are known
        async for event in events:
            for chunk in renderer.chunks(event):
                yield _sse(chunk)
        ended = True
        if include_usage:
            yield _sse(renderer.usage_chunk(_usage(producer, job)))
    except Exception as error:  # the status is out already: the stream says what happened
        ended = True
        yield _sse(as_api_error(error).body())
    finally:
        first.cancel()
        job.cancel()
        serving.note_end(endpoint, job)
        if not ended:
            serving.metrics.cancelled.inc()
    yield ServerSentEvent("[DONE]", sep="\n")


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


def _sse(data: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(data, ensure_ascii=False, separators=(",", ":")), sep="\n")
