"""``/v1/responses``: OpenAI's newer API, which Codex and its agents speak."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from ..answering import (
    ERRORS,
    STREAM,
    Ask,
    JsonBody,
    answer,
    check_names,
    count_prompt,
    note_headers,
)
from ..serving import Serving
from .responses_input import Item, ResponsesRequest, input_items, to_chat
from .responses_output import ResponseForm

router = APIRouter(prefix="/v1")


class ResponseObject(BaseModel):
    """A response; its items are of type message, reasoning and function_call."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class InputTokens(BaseModel):
    """How many tokens a request's prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class Deleted(BaseModel):
    """A response that is forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class Items(BaseModel):
    """Items of a conversation."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False]


_GONE: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 401, 403, 404, 413)}


@router.post(
    "/responses",
    response_model=ResponseObject,
    responses=ERRORS | {200: STREAM},
    summary="Answer items of a conversation",
)
async def responses(request: Request, body: Annotated[ResponsesRequest, JsonBody]) -> Response:
    """Answer items, with thoughts and calls as items."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    items = _conversation(serving, body)
    asked, notes = to_chat(body, items)
    producer = serving.producer(check_names(serving, body) + notes)

    def keep(response: dict[str, Any]) -> None:
        if body.store is not False:
            serving.responses.keep(response, items)

    form = ResponseForm(serving.settings.names[0], body, keep)
    return await answer(
        request, Ask(producer, form, lambda job: producer.chat(job, asked), stream=bool(body.stream))
    )


@router.post(
    "/responses/input_tokens",
    response_model=InputTokens,
    responses=ERRORS,
    summary="The tokens of items of a conversation",
)
async def input_tokens(request: Request, body: Annotated[ResponsesRequest, JsonBody]) -> Response:
    """Count what the prompt would have."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    asked, notes = to_chat(body, _conversation(serving, body))
    notes = check_names(serving, body) + notes
    n = await count_prompt(request, serving, asked)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": n}, headers=note_headers(notes))


@router.get(
    "/responses/{id}", response_model=ResponseObject, responses=_GONE, summary="A response that was kept"
)
async def kept_response(request: Request, id: str) -> Response:
    """One of the last responses, by its id."""
    return JSONResponse(_serving(request).responses.get(id).response)


@router.get("/responses/{id}/input_items", response_model=Items, responses=_GONE, summary="What it answered")
async def kept_items(request: Request, id: str) -> Response:
    """The items of the conversation before a response that was kept, the last one first."""
    items = _serving(request).responses.get(id).items
    data = [{"id": f"item_{i}", **item} for i, item in enumerate(items)][::-1]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return JSONResponse(
        {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": False}
    )


@router.delete("/responses/{id}", response_model=Deleted, responses=_GONE, summary="Forget a response")
async def forget(request: Request, id: str) -> Response:
    """Forget a response that was kept."""
    _serving(request).responses.drop(id)
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def _serving(request: Request) -> Serving:
    return request.app.state.serving


def _conversation(serving: Serving, body: ResponsesRequest) -> list[Item]:
    """All items of a request's conversation: those of the response that it goes on with before its own."""
    own = input_items(body)
    if body.previous_response_id is None:
        return own
    before = serving.responses.get(body.previous_response_id, "previous_response_id")
    return [*before.items, *before.response["output"], *own]
