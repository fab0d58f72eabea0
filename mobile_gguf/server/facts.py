"""What a server tells of itself: health, metrics, the expert map, and the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from sse_starlette import EventSourceResponse, ServerSentEvent

from mobile_gguf import __version__

from .answering import ERRORS
from .failures import ApiError
from .serving import STUCK, Serving

_MAP_SECONDS = 0.2
_KINDS = {
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "html": "text/html; charset=utf-8",
}
_SCRIPTS = (
    "answer",
    "api",
    "app",
    "chat",
    "conversations",
    "dom",
    "follow",
    "list",
    "map",
    "markdown",
    "math",
)
_SCRIPTS += ("receipt", "scroll", "settings", "thinking", "transfer", "turns")
_SCRIPTS += ("vendor/markdown-it", "vendor/temml")
PAGE = {  # the page's files by path; they need no key
    "/": "index.html",
    **{f"/{file}": file for file in (*(f"{name}.js" for name in _SCRIPTS), "app.css", "icon.svg")},
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
GUARDED: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 413)}
router = APIRouter()


class Health(BaseModel):
    """Whether requests are taken; ``needs_key`` if they need an API key."""

    status: Literal["ok"]
    model: str
    version: str
    needs_key: bool
    busy: bool
    waiting: int


class Experts(BaseModel):
    """The expert map: by tier a row of characters for each of ``layers``; ``states`` says what they mean.

    ``layers`` are those of the model's ``n_layer`` that have routed experts, ``dense_layers`` the others.
    ``resident`` counts by tier what is there, which the last token's hits and misses in the rows hide.
    """

    model_config = ConfigDict(extra="allow")
    object: Literal["experts"]
    n_layer: int
    n_expert: int
    layers: list[int]
    dense_layers: list[int]
    states: dict[str, str]
    tiers: dict[str, list[str]]
    resident: dict[str, int]
    n_tokens: int


@router.head("/health", include_in_schema=False)
@router.get("/v1/health", response_model=Health, include_in_schema=False)
@router.get(
    "/health",
    response_model=Health,
    responses={503: ERRORS[503]},
    summary="Whether requests are taken",
    openapi_extra={"security": []},
)
async def health(request: Request) -> dict[str, Any]:
    """Needs no key."""
    serving: Serving = request.app.state.serving
    if serving.closing.is_set():
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    if serving.worker.is_stuck:
        raise ApiError(503, STUCK, code="stuck")
    return {
        "status": "ok",
        "model": serving.settings.names[0],
        "version": __version__,
        "needs_key": serving.settings.api_key is not None,
        "busy": serving.worker.is_busy,
        "waiting": serving.worker.n_waiting,
    }


@router.get(
    "/metrics",
    response_class=Response,
    responses={**GUARDED, 200: {"content": {CONTENT_TYPE_LATEST: {}}}},
    summary="Metrics for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    serving: Serving = request.app.state.serving
    return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get(
    "/v1/experts",
    response_model=Experts,
    responses={**GUARDED, 400: ERRORS[400], 200: {"content": {"text/event-stream": {}}}},
    summary="The expert map",
)
async def experts(
    request: Request,
    stream: Annotated[Literal["true", "false"], Query(description="send every change as an event")] = "false",
) -> Response:
    """Where every expert is; as events also what the last token hit and missed."""
    serving: Serving = request.app.state.serving
    if stream == "true":
        return EventSourceResponse(_changes(serving), ping=10, sep="\n")
    return JSONResponse(serving.experts.snapshot())


async def _changes(serving: Serving) -> AsyncIterator[ServerSentEvent]:
    before = ""
    with serving.experts.following() as following:
        while not serving.closing.is_set():
            now = json.dumps(following.snapshot(), separators=(",", ":"))
            if now != before:
                yield ServerSentEvent(now, sep="\n")
                before = now
            await asyncio.sleep(_MAP_SECONDS)


def _add_page_file(path: str, file: str) -> None:
    async def page_file() -> Response:
        content = resources.files("mobile_gguf.server").joinpath("page", *file.split("/")).read_bytes()
        return Response(content, media_type=_KINDS[file.rpartition(".")[2]], headers=_PAGE_HEADERS)

    router.add_api_route(path, page_file, methods=["GET", "HEAD"], include_in_schema=False)


for _path, _file in PAGE.items():
    _add_page_file(_path, _file)
