"""llama-server's own endpoints: tokens of texts, prompts of chats, what the model is, gaps to be filled."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from mobile_gguf import __version__

from ..answering import (
    ERRORS,
    EVENT_STREAM,
    STREAM,
    Ask,
    Frame,
    JsonBody,
    answer,
    check_names,
    note_headers,
    one_in_line,
    sse,
)
from ..facts import GUARDED
from ..failures import ApiError
from ..produce import Event
from ..request_parts import Loose, Strict, Text, Tokens
from ..requests import ChatRequest, CompletionRequest, Generation
from ..serving import Serving

router = APIRouter()


class TokenizeRequest(Strict):
    """``POST /tokenize``."""

    content: Text = Field(description="the text")
    add_special: bool | None = Field(default=None, description="with what the model adds at the start")
    parse_special: bool | None = Field(
        default=None, description="read control tokens as such; true by default"
    )
    with_pieces: bool | None = Field(default=None, description="with the text of each token")
    model: str | None = Field(default=None, max_length=1000)


class TokenList(BaseModel):
    """Token ids, or objects with each one's ``piece``: text, or bytes where they are no text."""

    tokens: list[int] | list[dict[str, Any]]


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    tokens: Tokens | Annotated[list[int], Field(max_length=0)]
    model: str | None = Field(default=None, max_length=1000)


class Content(BaseModel):
    """Text."""

    content: str


class Prompt(BaseModel):
    """The text that the model is given of a chat."""

    prompt: str


class Props(BaseModel):
    """What llama-server says of a model."""

    model_config = ConfigDict(extra="allow")
    default_generation_settings: dict[str, Any]
    total_slots: int
    chat_template: str


class Extra(Loose):
    """A file beside the one with the gap."""

    filename: str | None = None
    text: Text


class InfillRequest(Generation):
    """``POST /infill``."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: list[Extra] | None = Field(default=None, max_length=256, description="other files")
    prompt: Text | None = Field(default=None, description="what the gap begins with")


class Filled(BaseModel):
    """What llama-server says of a text that was continued."""

    model_config = ConfigDict(extra="allow")
    content: str
    stop: bool


@router.post("/tokenize", response_model=TokenList, responses=ERRORS, summary="The tokens of a text")
async def tokenize(request: Request, body: Annotated[TokenizeRequest, JsonBody]) -> Response:
    """Token ids of a text, as the model reads it."""
    serving, notes = _checked(request, body)
    model = serving.model

    def work(_job: object) -> list[Any]:
        special = body.parse_special is not False
        tokens = model.tokenize(body.content, add_bos=bool(body.add_special), special=special)
        if not body.with_pieces:
            return tokens
        return [{"id": token, "piece": _piece(model.piece(token, special=True))} for token in tokens]

    return JSONResponse({"tokens": await one_in_line(request, work)}, headers=note_headers(notes))


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


@router.post("/detokenize", response_model=Content, responses=ERRORS, summary="The text of tokens")
async def detokenize(request: Request, body: Annotated[DetokenizeRequest, JsonBody]) -> Response:
    """The text of token ids, control tokens as they are written."""
    serving, notes = _checked(request, body)
    model = serving.model
    text = await one_in_line(request, lambda _job: model.detokenize(body.tokens, special=True))
    return JSONResponse({"content": text}, headers=note_headers(notes))


@router.post("/apply-template", response_model=Prompt, responses=ERRORS, summary="The prompt of a chat")
async def apply_template(request: Request, body: Annotated[ChatRequest, JsonBody]) -> Response:
    """What the chat template makes of messages and tools, as text."""
    serving, notes = _checked(request, body)
    producer = serving.producer()

    def work(_job: object) -> str:
        return serving.model.detokenize(producer.chat_prompt(body), special=True)

    return JSONResponse({"prompt": await one_in_line(request, work)}, headers=note_headers(notes))


@router.get("/props", response_model=Props, responses=GUARDED, summary="What the model is")
async def props(request: Request) -> dict[str, Any]:
    """In llama-server's words; without paths of this machine."""
    serving: Serving = request.app.state.serving
    model, info = serving.model, serving.model.info
    defaults = {**_plain(vars(model.defaults)), **_plain(serving.settings.defaults)}
    return {
        "default_generation_settings": {"n_ctx": model.n_ctx, "params": defaults},
        "total_slots": model.crew.most,
        "model_alias": serving.settings.names[0],
        "model_path": info.path.name,
        "modalities": {"vision": False, "audio": False},
        "chat_template": info.chat_template or "",
        "build_info": f"mobile-gguf {__version__}",
        "fills_gaps": model.fills_gaps,
    }


def _plain(values: Any) -> dict[str, Any]:
    return {name: one for name, one in dict(values).items() if isinstance(one, (str, int, float, bool))}


class TextForm:
    """The Form of llama-server's completions."""

    media_type = EVENT_STREAM

    def __init__(self, model: str) -> None:
        self._model = model
        self._begun = time.monotonic()
        self._reason: str | None = None

    def whole(self, events: list[Event], usage: dict[str, Any]) -> dict[str, Any]:
        for event in events:
            self._reason = event.finish_reason or self._reason
        return self._last("".join(event.text for event in events), usage)

    def so_far(self, events: list[Event]) -> dict[str, Any]:
        return {"content": "".join(event.text for event in events)}

    def begun(self, _usage: dict[str, Any]) -> Iterable[Frame]:
        return ()

    def frames(self, event: Event) -> Iterator[Frame]:
        self._reason = event.finish_reason or self._reason
        if event.text:
            yield sse({"index": 0, "content": event.text, "stop": False})

    def ended(self, usage: dict[str, Any]) -> Iterator[Frame]:
        yield sse(self._last("", usage))

    def failed(self, error: ApiError, _usage: dict[str, Any]) -> Iterator[Frame]:
        yield sse(error.body())

    def ping(self) -> None:
        return None

    def _last(self, content: str, usage: dict[str, Any]) -> dict[str, Any]:
        cut = self._reason == "length"
        n, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        timings = {
            "prompt_n": n - cached,
            "cache_n": cached,
            "predicted_n": usage["completion_tokens"],
            "predicted_per_second": usage["tokens_per_second"],
        }
        return {
            "index": 0,
            "content": content,
            "stop": True,
            "stop_type": "limit" if cut else "eos",
            "truncated": False,
            "model": self._model,
            "tokens_predicted": usage["completion_tokens"],
            "tokens_evaluated": n,
            "tokens_cached": cached,
            "timings": timings,
            "usage": usage,
        }


@router.post(
    "/completion", response_model=Filled, responses=ERRORS | {200: STREAM}, summary="Continue a text"
)
async def completion(request: Request, body: Annotated[CompletionRequest, JsonBody]) -> Response:
    """Continue one prompt, in llama-server's form."""
    serving, notes = _checked(request, body)
    if body.prompt and not isinstance(body.prompt, str) and not isinstance(body.prompt[0], int):
        raise ApiError(400, "prompt must be one text, or its token ids", param="prompt")
    if (body.n or 1) > 1:
        raise ApiError(400, "n must be 1: /v1/completions gives several answers", param="n")
    producer = serving.producer(notes)
    form = TextForm(serving.settings.names[0])
    return await answer(
        request, Ask(producer, form, lambda job: producer.completion(job, body), stream=bool(body.stream))
    )


@router.post("/infill", response_model=Filled, responses=ERRORS | {200: STREAM}, summary="Fill a gap")
async def infill(request: Request, body: Annotated[InfillRequest, JsonBody]) -> Response:
    """What stands between two texts; a 400 says so if the model was not made for it."""
    serving, notes = _checked(request, body)
    producer = serving.producer(notes)
    form = TextForm(serving.settings.names[0])
    files = "".join(f"{one.filename or ''}\n{one.text}\n" for one in body.input_extra or ())
    texts = (files + body.input_prefix, body.input_suffix, body.prompt or "")
    return await answer(
        request,
        Ask(producer, form, lambda job: producer.filling(job, body, *texts), stream=bool(body.stream)),
    )


# What llama.vscode sends of llama-server's own: how it samples in parts, and how long it may take.
_LLAMA_SERVER = frozenset(
    {"samplers", "n_indent", "t_max_prompt_ms", "t_max_predict_ms", "n_keep", "n_cache_reuse", "n_discard"}
    | {"post_sampling_probs", "response_fields", "n_probs", "cache_reuse", "repeat_last_n"}
)


def _checked(request: Request, body: Any) -> tuple[Serving, list[str]]:
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    return serving, check_names(serving, body, _LLAMA_SERVER)
