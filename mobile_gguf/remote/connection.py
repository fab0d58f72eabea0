"""Asking an OpenAI server: JSON, and answers that come as server-sent events and can be cut off.

Over the standard library's client, whose socket is at hand: who waits for a token that does not come is
woken by closing it. A request has a connection of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from mobile_gguf import __version__
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.wording import plain

_QUESTION_SECONDS = 30.0
_POLL_SECONDS = 0.1
_LONGEST_ERROR = 400
_PORTS = {"http": 80, "https": 443}
_NEEDS_KEY = ": give its key by --api-key-file FILE"
_HINTS = {401: _NEEDS_KEY, 403: _NEEDS_KEY, 404: ": is it a server with OpenAI's API?"}


class RemoteError(MobileError):
    """The server cannot be reached, or says no."""


class Server:
    """An address and a key; ``api`` is where its API is, ``root`` what is above it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises UsageError for what is no address."""
        text = url if "://" in url else f"http://{url}"
        if not url.strip():
            raise UsageError("the address of the server is empty: give one such as http://127.0.0.1:8080")
        try:
            parts = urllib.parse.urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"{plain(url)} is no address of a server: {error}") from None
        if parts.scheme not in _PORTS or not host or parts.query or parts.fragment:
            raise UsageError(
                f"{plain(url)} is no address of a server: give one such as http://127.0.0.1:8080"
            )
        if parts.username or parts.password:
            raise UsageError("an address has no place for a key: give it by --api-key-file FILE")
        self.scheme, self.host, self.port = parts.scheme, host, port or _PORTS[parts.scheme]
        path = parts.path.rstrip("/")
        self.api = path or "/v1"
        self.root = self.api.removesuffix("/v1")
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._key = key

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises RemoteError."""
        with self._asked("GET", path, None, _QUESTION_SECONDS) as response:
            return self._json(response.read())

    def events(
        self, path: str, body: dict[str, Any] | None, should_stop: Callable[[], bool] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """What a server sends, event by event, until it ends or ``should_stop`` says so. Raises RemoteError.

        A server that does not stream gives its whole answer as one.
        """
        method = "GET" if body is None else "POST"
        stopped = threading.Event()
        with contextlib.ExitStack() as stack:
            try:
                cut = _Cut(should_stop, stopped) if should_stop is not None else None
                if cut is not None:
                    stack.enter_context(cut)
                response = stack.enter_context(self._asked(method, path, body, None, cut))
                if "event-stream" in response.headers.get("Content-Type", ""):
                    for text in data_of(iter(response.readline, b"")):
                        yield self._event(text)
                else:
                    yield self._json(response.read())
            except (RemoteError, OSError, http.client.HTTPException, ValueError) as error:
                if stopped.is_set():
                    return
                if isinstance(error, RemoteError):
                    raise
                raise RemoteError(f"{self.url} broke off: {_why(error)}") from None

    def _event(self, text: str) -> dict[str, Any]:
        event = self._json(text.encode())
        if isinstance(event, dict) and event.get("error"):
            raise RemoteError(f"{self.url}: {message_of(event)}")
        return event

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise RemoteError(f"{self.url} sent what is no JSON: is it a server with OpenAI's API?") from None

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout: float | None,
        cut: _Cut | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        connection, prefix = self._connection()
        headers = {
            "User-Agent": f"mobile-gguf/{__version__}",
            "Accept": "application/json, text/event-stream",
        }
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            try:
                connection.connect()
                assert connection.sock is not None
                connection.sock.settimeout(timeout)
                if cut is not None:
                    cut.socket = connection.sock
                connection.request(method, prefix + path, data, headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise RemoteError(f"{self.url} cannot be reached: {_why(error)}") from None
            if response.status >= 300:
                raise RemoteError(self._refusal(method, response))
            yield response
        finally:
            connection.close()

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        """A connection, through the proxy that the environment names, and what goes before a path."""
        proxy = urllib.request.getproxies().get(self.scheme)
        if proxy and not urllib.request.proxy_bypass(self.host):
            through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            if through.scheme != "http" or not through.hostname:
                raise RemoteError(f"the proxy {plain(proxy)} is of a kind that is not known here")
            if self.scheme == "https":
                made = _https(through.hostname, through.port or 80)
                made.set_tunnel(self.host, self.port)
                return made, ""
            host = f"[{self.host}]" if ":" in self.host else self.host
            made = http.client.HTTPConnection(through.hostname, through.port or 80, timeout=_QUESTION_SECONDS)
            return made, f"http://{host}:{self.port}"
        if self.scheme == "https":
            return _https(self.host, self.port), ""
        return http.client.HTTPConnection(self.host, self.port, timeout=_QUESTION_SECONDS), ""

    def _refusal(self, method: str, response: http.client.HTTPResponse) -> str:
        if response.status < 400:
            return f"{self.url} has moved to {plain(response.headers.get('Location', 'another place'))}"
        try:
            said = message_of(json.loads(response.read(1 << 20)))
        except (OSError, ValueError, RecursionError, http.client.HTTPException):
            said = response.reason
        # what is not there of a server that was asked for an answer may be its model
        hint = _HINTS.get(response.status, "") if method == "GET" or response.status != 404 else ""
        return f"{self.url} answers {response.status}: {said}{hint}"


class _Cut:
    """A thread that closes a connection's socket as soon as somebody wants to stop."""

    def __init__(self, should_stop: Callable[[], bool], stopped: threading.Event) -> None:
        self.socket: socket.socket | None = None
        self._should_stop = should_stop
        self._stopped = stopped
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mobile-gguf-cut", daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            if self._should_stop():
                self._stopped.set()
                if self.socket is not None:
                    with contextlib.suppress(OSError):
                        self.socket.shutdown(socket.SHUT_RDWR)
                    return

    def __enter__(self) -> _Cut:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._done.set()
        self._thread.join()


def data_of(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of server-sent events, until one says ``[DONE]``."""
    data: list[str] = []
    for line in lines:
        text = line.decode("utf-8", errors="replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
        elif not text and data:
            whole, data = "\n".join(data), []
            if whole.strip() == "[DONE]":
                return
            yield whole


def message_of(said: Any) -> str:
    """What an error's JSON says, in one line."""
    error = said.get("error", said) if isinstance(said, dict) else said
    text = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    return plain(" ".join(str(text or said).split()))[:_LONGEST_ERROR]


def _https(host: str, port: int) -> http.client.HTTPSConnection:
    context = ssl.create_default_context()
    return http.client.HTTPSConnection(host, port, timeout=_QUESTION_SECONDS, context=context)


def _why(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__
