"""ollama's API as far as its clients need it: chats, prompts, embeddings, and what there is to ask."""

from __future__ import annotations

import hashlib
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ..answering import (
    ERRORS,
    NDJSON,
    Ask,
    JsonBody,
    answer,
    check_names,
    in_line,
    note_headers,
)
from ..embeddings import embed_all, pooling_of, shortened
from ..failures import ApiError
from ..models import iso_time
from ..serving import Serving
from .ollama_input import (
    OllamaChatRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
    to_answer,
    to_chat,
)
from .ollama_output import OllamaForm

# Whose API this is like: clients compare it with what they need at least.
_VERSION = "0.12.6"
_LONG_AFTER = 10**10  # the model stays until the server ends

router = APIRouter(prefix="/api")


class OllamaError(BaseModel):
    """ollama's error, with what was answered before."""

    model_config = ConfigDict(extra="allow")
    error: str = Field(description="what went wrong")


class OllamaAnswer(BaseModel):
    """A whole answer, or one line of a streamed one."""

    model_config = ConfigDict(extra="allow")
    model: str
    created_at: str
    done: bool


class OllamaModels(BaseModel):
    """The models of this server."""

    models: list[dict[str, Any]]


class OllamaModel(BaseModel):
    """What ollama says of a model."""

    model_config = ConfigDict(extra="allow")
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaVersion(BaseModel):
    """The version of ollama whose API this is like."""

    version: str


class OllamaVectors(BaseModel):
    """Vectors of length 1, in the order of the texts."""

    model_config = ConfigDict(extra="allow")
    model: str
    embeddings: list[list[float]]


FAILURES = {status: {**one, "model": OllamaError} for status, one in ERRORS.items()}
_GUARDED: dict[int | str, dict[str, Any]] = {status: FAILURES[status] for status in (401, 403, 413)}
_LINES: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer; lines of JSON unless stream is false", "content": {NDJSON: {}}}
}


@router.post("/chat", response_model=OllamaAnswer, responses=FAILURES | _LINES, summary="Answer a chat")
async def chat(request: Request, body: Annotated[OllamaChatRequest, JsonBody]) -> Response:
    """Answer messages, with tools and thoughts, as ollama does."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    form = OllamaForm(serving.settings.names[0], chat=True)
    if not body.messages:  # clients have the model loaded that way
        return JSONResponse(_loaded(serving) | {"message": {"role": "assistant", "content": ""}})
    asked, notes = to_chat(body)
    producer = serving.producer(check_names(serving, body) + notes)
    return await answer(
        request, Ask(producer, form, lambda job: producer.chat(job, asked), stream=bool(asked.stream))
    )


@router.post("/generate", response_model=OllamaAnswer, responses=FAILURES | _LINES, summary="Answer a prompt")
async def generate(request: Request, body: Annotated[OllamaGenerateRequest, JsonBody]) -> Response:
    """Answer a prompt as a chat of one message, continue it (raw), or fill the gap before a suffix."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    if not body.prompt:
        return JSONResponse(_loaded(serving) | {"response": ""})
    form = OllamaForm(serving.settings.names[0], chat=False)
    asked, notes = to_answer(body)
    producer = serving.producer(check_names(serving, body) + notes)
    return await answer(
        request, Ask(producer, form, lambda job: producer.events(job, asked), stream=bool(asked.stream))
    )


def _loaded(serving: Serving) -> dict[str, Any]:
    head = {"model": serving.settings.names[0], "created_at": iso_time(time.time())}
    return head | {"done": True, "done_reason": "load"}


@router.post("/embed", response_model=OllamaVectors, responses=FAILURES, summary="Texts as vectors")
async def embed(request: Request, body: Annotated[OllamaEmbedRequest, JsonBody]) -> Response:
    """Embed one or several texts; a 400 says so if the model or the server cannot."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    notes = check_names(serving, body)
    pooling = pooling_of(serving)
    given = [body.input] if isinstance(body.input, str) else body.input
    if not all(given):
        raise ApiError(400, "input holds an empty text", param="input", code="invalid_value")
    vectors = await in_line(request, lambda job: embed_all(job, serving, list(given), pooling))
    values = [[float(one) for one in shortened(vector.values, body.dimensions)] for vector in vectors]
    made = {
        "model": serving.settings.names[0],
        "embeddings": values,
        "prompt_eval_count": sum(one.n_tokens for one in vectors),
    }
    return JSONResponse(made, headers=note_headers(notes))


@router.get("/tags", response_model=OllamaModels, responses=_GUARDED, summary="The model served")
async def tags(request: Request) -> dict[str, Any]:
    """The one model, by each of its names."""
    serving: Serving = request.app.state.serving
    return {"models": [_card(serving, name) for name in serving.settings.listed_names]}


@router.get("/ps", response_model=OllamaModels, responses=_GUARDED, summary="The model in memory")
async def running(request: Request) -> dict[str, Any]:
    """The same, which is loaded as long as the server runs."""
    serving: Serving = request.app.state.serving
    more = {
        "expires_at": iso_time(_LONG_AFTER),
        "size_vram": 0,
        "context_length": serving.model.n_ctx,
    }
    return {"models": [_card(serving, name) | more for name in serving.settings.listed_names]}


@router.get(
    "/version", response_model=OllamaVersion, responses=_GUARDED, summary="The version of ollama's API"
)
async def version() -> dict[str, str]:
    """Whose API this is like."""
    return {"version": _VERSION}


@router.post("/show", response_model=OllamaModel, responses=FAILURES, summary="What the model is")
async def show(request: Request, body: Annotated[OllamaShowRequest, JsonBody]) -> dict[str, Any]:
    """What ollama says of a model."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model or body.name)
    check_names(serving, body)
    model, info = serving.model, serving.model.info
    architecture = info.architecture
    template = info.chat_template or ""
    capabilities = {
        "completion": model.can_generate,
        "tools": model.can_generate,
        "insert": model.fills_gaps,
        "thinking": "thinking" in template or "<think>" in template,
        "embedding": model.pooling is not None or serving.settings.pooling is not None,
    }
    return {
        "modelfile": "",
        "license": info.license or "",
        "parameters": "",
        "template": template,
        "modified_at": iso_time(serving.started),
        "details": _details(serving),
        "model_info": {
            "general.architecture": architecture,
            "general.basename": info.name,
            f"{architecture}.context_length": model.n_ctx,
            f"{architecture}.embedding_length": info.n_embd,
            f"{architecture}.block_count": info.n_layer,
            f"{architecture}.expert_count": info.n_expert,
            f"{architecture}.expert_used_count": info.n_expert_used,
        },
        "capabilities": [name for name, is_so in capabilities.items() if is_so],
    }


def _card(serving: Serving, name: str) -> dict[str, Any]:
    info = serving.model.info
    digest = hashlib.sha256(f"{info.name}{info.file_bytes}".encode()).hexdigest()
    return {
        "name": name,
        "model": name,
        "modified_at": iso_time(serving.started),
        "size": info.file_bytes,
        "digest": digest,
        "details": _details(serving),
    }


def _details(serving: Serving) -> dict[str, Any]:
    info = serving.model.info
    return {
        "parent_model": "",
        "format": "gguf",
        "family": info.architecture,
        "families": [info.architecture],
        "parameter_size": "",
        "quantization_level": info.quantization or "",
    }
