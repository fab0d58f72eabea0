"""What stands before the application: hosts, the API key, the size of a body and how slowly it may come."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .facts import PAGE
from .failures import ApiError
from .settings import ServerSettings

# Open without a key: what tells that there is a server, and the page that asks for the key.
OPEN_PATHS = {"/health", *PAGE}


class Guard:
    """ASGI middleware that refuses what must not reach the application.

    A server that listens on this machine only answers to names of this machine only, so that a web site
    cannot reach it through a name of its own that leads here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        key = settings.api_key
        self._key = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_key(scope["path"], scope["method"], headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            error.headers.setdefault("Connection", "close")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_host(self, headers: Headers) -> None:
        if not self._settings.hosts:
            return
        try:
            name = urlsplit("//" + headers.get("host", "")).hostname
        except ValueError:
            name = None
        if name not in self._settings.hosts:
            raise ApiError(403, "this server answers to names of its own machine only", code="host_refused")

    def _check_key(self, path: str, method: str, headers: Headers) -> None:
        # a browser's question whether it may ask carries no key
        if self._key is None or path in OPEN_PATHS or method == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if not given:
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(
                401, "an API key is needed: Authorization: Bearer KEY", code="no_api_key", headers=challenge
            )
        matches = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
        if scheme.lower() != "bearer" or not matches:
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "the API key is wrong", code="invalid_api_key", headers=challenge)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._settings.max_request_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            with anyio.fail_after(self._settings.body_timeout or None):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before the body was complete")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise _too_large(limit)
                    chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body was not complete in {self._settings.body_timeout:g} s") from None
        return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, and then whatever the connection has to say."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
