"""``/v1/chat/completions`` and ``/v1/completions``: OpenAI's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answering import ERRORS, STREAM, Ask, JsonBody, answer, check_names
from .answers import Completion, Renderer
from .requests import ChatRequest, CompletionRequest, Generation
from .serving import Serving

router = APIRouter(prefix="/v1")


@router.post(
    "/chat/completions", response_model=Completion, responses=ERRORS | {200: STREAM}, summary="Answer a chat"
)
async def chat_completions(request: Request, body: Annotated[ChatRequest, JsonBody]) -> Response:
    """Answer messages, with tools or by a JSON schema if asked."""
    return await _answer(request, body, chat=True, with_logprobs=bool(body.logprobs))


@router.post(
    "/completions", response_model=Completion, responses=ERRORS | {200: STREAM}, summary="Continue a text"
)
async def completions(request: Request, body: Annotated[CompletionRequest, JsonBody]) -> Response:
    """Continue one or several prompts."""
    return await _answer(request, body, chat=False, with_logprobs=body.logprobs is not None)


async def _answer(
    request: Request, body: ChatRequest | CompletionRequest, *, chat: bool, with_logprobs: bool
) -> Response:
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    producer = serving.producer(check_names(serving, body))
    form = Renderer(
        serving.settings.names[0],
        chat=chat,
        with_logprobs=with_logprobs,
        include_usage=_wants(body, "include_usage"),
    )
    ask = Ask(
        producer,
        form,
        lambda job: producer.events(job, body),
        stream=bool(body.stream),
        every_usage=bool(body.stream) and _wants(body, "continuous_usage_stats"),
    )
    return await answer(request, ask)


def _wants(body: Generation, option: str) -> bool:
    return body.stream_options is not None and bool(getattr(body.stream_options, option))
