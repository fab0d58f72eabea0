"""``/v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

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
from .messages_input import CountRequest, MessagesRequest, to_chat
from .messages_output import MessageForm

router = APIRouter(prefix="/v1")


class AnthropicErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """Anthropic's error object, with the content so far of an answer that was not streamed."""

    type: Literal["error"]
    error: AnthropicErrorDetail = Field(description="what went wrong")
    content: list[dict[str, Any]] | None = None


class AnthropicAnswer(BaseModel):
    """A message; its blocks are of type text, thinking and tool_use."""

    model_config = ConfigDict(extra="allow")
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "tool_use"]
    usage: dict[str, Any]


class TokenCount(BaseModel):
    """How many tokens a conversation's prompt has."""

    input_tokens: int


FAILURES = {status: {**one, "model": AnthropicError} for status, one in ERRORS.items()}


@router.post(
    "/messages",
    response_model=AnthropicAnswer,
    responses=FAILURES | {200: STREAM},
    summary="Answer messages in Anthropic's form",
)
async def messages(request: Request, body: Annotated[MessagesRequest, JsonBody]) -> Response:
    """Answer messages, with tools and thoughts as blocks."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    asked, notes = to_chat(body)
    producer = serving.producer(check_names(serving, body) + notes)
    form = MessageForm(serving.settings.names[0])
    return await answer(
        request, Ask(producer, form, lambda job: producer.chat(job, asked), stream=bool(body.stream))
    )


@router.post(
    "/messages/count_tokens",
    response_model=TokenCount,
    responses=FAILURES,
    summary="The tokens of messages in Anthropic's form",
)
async def count_tokens(request: Request, body: Annotated[CountRequest, JsonBody]) -> Response:
    """Count what the prompt would have."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    asked, notes = to_chat(body)
    notes = check_names(serving, body) + notes
    n = await count_prompt(request, serving, asked)
    return JSONResponse({"input_tokens": n}, headers=note_headers(notes))
