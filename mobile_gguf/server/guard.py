"""What stands before the application: hosts, the API key, the size of a body and how slowly it may come."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .facts import PAGE
from .failures import ApiError, retry_after
from .settings import ServerSettings

# Open without a key: what tells that there is a server, and the page that asks for the key.
OPEN_PATHS = {"/health", *PAGE}
# Values in one body, in all lists and objects: far more than token ids that a context holds.
MAX_VALUES = 300_000
# What a client that is refused may still send: closed before, it would hear of a broken connection alone.
DRAIN_BYTES, DRAIN_SECONDS = 64 << 20, 5.0
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


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
        self._n_bytes = 0  # of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        incoming = _Incoming(headers, receive)
        try:
            self._check_host(headers)
            self._check_key(scope["path"], scope["method"], headers)
            _check_encoding(headers)
        except ApiError as error:
            await _refuse(error, scope, incoming, send)
            return
        held = _Held()
        try:
            try:
                body = await self._body(headers, incoming, held)
                check_values(body)
            except ApiError as error:
                await _refuse(error, scope, incoming, send)
                return
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._n_bytes -= held.n_bytes

    def _hold(self, held: _Held, n_bytes: int) -> None:
        """Count a body's bytes among those of all; raises ApiError if there are too many."""
        if self._n_bytes + n_bytes > self._settings.all_bytes:
            raise ApiError(
                429,
                "the requests that are being answered are as large as may be: try again later",
                code="requests_too_large",
                headers=retry_after(2),
            )
        self._n_bytes += n_bytes
        held.n_bytes += n_bytes

    def _check_host(self, headers: Headers) -> None:
        if not self._settings.hosts:
            return
        try:
            name = urlsplit("//" + headers.get("host", "")).hostname
        except ValueError:
            name = None
        if name not in self._settings.hosts and not (self._settings.addresses and _is_address(name)):
            raise ApiError(
                403,
                f"this server does not answer to the name {ascii(name)[:80]}: ask for it by its address, "
                "or start it with --allow-host NAME",
                code="host_refused",
            )

    def _check_key(self, path: str, method: str, headers: Headers) -> None:
        # a browser's question whether it may ask carries no key
        if self._key is None or path in OPEN_PATHS or method == "OPTIONS":
            return
        challenge = {"WWW-Authenticate": "Bearer"}
        given = _given_key(headers)
        if not given:
            raise ApiError(
                401,
                "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="no_api_key",
                headers=challenge,
            )
        if not hmac.compare_digest(given.encode("latin-1", "replace"), self._key):
            raise ApiError(401, "the API key is wrong", code="invalid_api_key", headers=challenge)

    async def _body(self, headers: Headers, incoming: _Incoming, held: _Held) -> bytes:
        limit = self._settings.max_request_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            with anyio.fail_after(self._settings.body_timeout or None):
                while incoming.is_incomplete:
                    message = await incoming.receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before the body was complete")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise _too_large(limit)
                    self._hold(held, len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            raise ApiError(408, f"the body was not complete in {self._settings.body_timeout:g} s") from None
        except asyncio.CancelledError:
            message = "the server shuts down, and the body was not complete"
            raise ApiError(503, message, code="cut") from None
        return b"".join(chunks)


def _given_key(headers: Headers) -> str:
    """The key that a client sends: OpenAI's way, else Anthropic's; one of another scheme is none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "") or ("?" if scheme else "")
    return given.strip()


@dataclass
class _Held:
    """Bytes of one body."""

    n_bytes: int = 0


class _Incoming:
    """A request's body as it comes."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        self._headers = headers
        self._receive = receive
        self.is_incomplete = True

    async def receive(self) -> Message:
        message = await self._receive()
        self.is_incomplete = message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Drop what still comes, within limits: a client may read no answer before it has sent all.

        One that asks before it sends (``Expect: 100-continue``) sends nothing then.
        """
        length = self._headers.get("content-length", "")
        if "expect" in self._headers or (length.isdigit() and int(length) > DRAIN_BYTES):
            return
        n_bytes = 0
        with anyio.move_on_after(DRAIN_SECONDS):
            while self.is_incomplete and n_bytes <= DRAIN_BYTES:
                n_bytes += len((await self.receive()).get("body", b""))


async def _refuse(error: ApiError, scope: Scope, incoming: _Incoming, send: Send) -> None:
    if error.status not in (408, 503):  # which come where nothing has come for long
        await incoming.drain()
    error.headers.setdefault("Connection", "close")
    await error.response(scope["path"])(scope, incoming.receive, send)


def _is_address(name: str | None) -> bool:
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return False
    return True


def _check_encoding(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415,
            f"the body is {ascii(encoding)[:40]}: send it without Content-Encoding",
            code="unsupported_encoding",
        )


def check_values(body: bytes) -> None:
    """Raise ApiError for a body of more values than may be: each takes some 20 times its bytes."""
    if _n_values(body) > MAX_VALUES and _n_values(_STRINGS.sub(b"", body)) > MAX_VALUES:
        raise ApiError(413, f"the request holds more than {MAX_VALUES} values", code="request_too_large")


def _n_values(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, and then whatever the connection has to say."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
