"""``/v1/models``: the model by each of its names, in a form that OpenAI's and Anthropic's clients read."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from mobile_gguf.options import GenerateOptions, make_options
from mobile_gguf.options.words import EXACT, MODES

from .answering import ERRORS
from .facts import GUARDED
from .serving import Serving

router = APIRouter(prefix="/v1")
_SHOWN_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "seed", "max_kld")


class ModelCard(BaseModel):
    """A model as ``/v1/models`` lists it, with what vLLM and Anthropic say of one; ``meta`` is ours."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(BaseModel):
    """The models of this server: one, by each of its names."""

    model_config = ConfigDict(extra="allow")
    object: Literal["list"]
    data: list[ModelCard]


def iso_time(seconds: float) -> str:
    """A moment as Anthropic's and ollama's clients read it."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat().replace("+00:00", "Z")


def _card(serving: Serving, name: str) -> dict[str, Any]:
    model = serving.model
    info = model.info
    meta = {
        "name": info.name,
        "architecture": info.architecture,
        "quantization": info.quantization,
        "n_ctx": model.n_ctx,
        "n_ctx_train": info.n_ctx_train,
        "n_vocab": info.n_vocab,
        "n_embd": info.n_embd,
        "n_expert": info.n_expert,
        "n_expert_used": info.n_expert_used,
        "n_layer_moe": info.n_layer_moe if info.is_moe else 0,
        "file_bytes": info.file_bytes,
        "expert_bytes": info.expert_bytes if info.is_moe else 0,
        "ram_budget_bytes": model.budget_bytes,
        "mode": model.mode,
        "little_k": model.little_k,
        "gamma": model.gamma,
        "chats": model.can_generate,
        "embeddings": model.pooling or serving.settings.pooling,
        "defaults": _defaults(serving),
        "modes": list(MODES) if info.is_moe and info.n_expert_used > 1 else [EXACT],
    }
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": info.name,
        "created": serving.started,
        "created_at": iso_time(serving.started),
        "owned_by": "mobile-gguf",
        "context_length": model.n_ctx,
        "max_model_len": model.n_ctx,
        "meta": meta,
    }


def _defaults(serving: Serving) -> dict[str, Any]:
    """What holds where a request says nothing: the command line's options, the model's own, or ours."""
    options = make_options(GenerateOptions, {**serving.settings.defaults}, serving.model.defaults)
    return {name: getattr(options, name) for name in _SHOWN_DEFAULTS}


@router.get("/models", response_model=ModelList, responses=GUARDED, summary="The model served")
async def models(request: Request) -> dict[str, Any]:
    """The one model, by each of its names."""
    serving: Serving = request.app.state.serving
    cards = [_card(serving, name) for name in serving.settings.listed_names]
    ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"], "has_more": False}
    return {"object": "list", "data": cards} | ends


@router.get(
    "/models/{name:path}",
    response_model=ModelCard,
    responses={**GUARDED, 404: ERRORS[404]},
    summary="The model by name",
)
async def model_by_name(request: Request, name: str) -> dict[str, Any]:
    """The card of the model, by any of its names."""
    serving: Serving = request.app.state.serving
    serving.check_model(name)
    return _card(serving, name if name in serving.settings.names else serving.settings.names[0])
