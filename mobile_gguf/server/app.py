"""The application: routes, guards and errors put together around one model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobile_gguf import __version__
from mobile_gguf.api.model import Model

from . import completions, embeddings, facts, models
from .apis import llamacpp, messages, ollama, rerank, responses, slots
from .failures import add_handlers
from .guard import Guard
from .serving import Serving
from .settings import ServerSettings

_OF_A_VERSION = (
    completions.router,
    responses.router,
    messages.router,
    embeddings.router,
    rerank.router,
    models.router,
)
_DESCRIPTION = """OpenAI's API for one model, served by mobile-gguf. Beyond OpenAI's fields a request may hold
`mode`, `gamma`, `head_threshold`, `little_k` and llama.cpp's sampling options; every answer's `usage` holds
a `receipt`."""


def create_app(model: Model, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI application that answers with ``model``, which nobody else may use meanwhile.

    The model is not closed with the application.
    """
    settings = settings or ServerSettings(names=(model.path.stem,))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving = Serving(model, settings)
        app.state.serving = serving
        try:
            yield
        finally:
            await serving.close()

    app = FastAPI(
        title="mobile-gguf",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    for router in _OF_A_VERSION:
        app.include_router(router)
        app.include_router(_without_version(router))
    for router in (facts.router, llamacpp.router, slots.router, ollama.router):
        app.include_router(router)
    add_handlers(app)
    app.add_middleware(Guard, settings=settings)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(_Counting, of=app)
    _describe(app, settings)
    return app


def _without_version(router: APIRouter) -> APIRouter:
    """The same at the paths that some clients are configured to ask."""
    made = APIRouter(include_in_schema=False)
    for route in router.routes:
        if isinstance(route, APIRoute):
            methods = sorted(route.methods or ())
            made.add_api_route(route.path.removeprefix("/v1"), route.endpoint, methods=methods)
    return made


class _Counting:
    """Counts every request by endpoint and status, those that were refused before the routes as well."""

    def __init__(self, app: ASGIApp, of: FastAPI) -> None:
        self._app = app
        self._of = of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Only routes: a client could invent paths without end.
                route = scope.get("route")
                endpoint = getattr(route, "path", "other")
                self._of.state.serving.metrics.requests.labels(endpoint, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _describe(app: FastAPI, settings: ServerSettings) -> None:
    """Have the OpenAPI document say what is true: 400 instead of FastAPI's 422, and the key."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = made()
        schemas = document.get("components", {}).get("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        if settings.api_key is not None:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
