"""What a connection may do: how long it may take for its headers, how many there are, who never reads.

uvicorn bounds the idle time of a connection that had an answer, and nothing else. A client that drips its
headers, or opens connections and sends nothing, would hold them for ever; one that does not read its answer
would hold the answer.
"""

from __future__ import annotations

import asyncio
import http
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .failures import ApiError, retry_after
from .settings import ServerSettings


def _answer(error: ApiError) -> bytes:
    """A whole answer for a connection that has no request yet."""
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    lines = [f"{name}: {value}" for name, value in (headers | error.headers).items()]
    status = http.HTTPStatus(error.status)
    head = "\r\n".join([f"HTTP/1.1 {status.value} {status.phrase}", *lines])
    return f"{head}\r\n\r\n".encode() + body


def protocol_of(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's protocol with the limits of ``settings``."""

    class Limited(LimitedProtocol):
        limits = settings

    return Limited


class LimitedProtocol(H11Protocol):
    """One connection; made by uvicorn."""

    limits: ServerSettings

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    # connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and not self._replaces_another():
            busy = ApiError(
                503,
                "there are too many connections: try again later",
                code="connections_full",
                headers=retry_after(1),
            )
            transport.write(_answer(busy))
            transport.close()
            return
        self._headers_timer = self._later(self.limits.header_timeout, self._drop_slow)

    def _replaces_another(self) -> bool:
        """Close the connection that waits longest for a request; whether there was one."""
        others = [
            one
            for one in self.connections
            if isinstance(one, LimitedProtocol) and one is not self and not one.is_answering
        ]
        if not others:
            return False
        min(others, key=lambda one: one.waits_since).transport.abort()
        return True

    @property
    def is_answering(self) -> bool:
        """Whether a request was read and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits_since(self) -> float:
        """When the time for the next request began."""
        timer = self._headers_timer or self.timeout_keep_alive_task
        return timer.when() if timer is not None else 0.0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_headers_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    # headers

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_answering:
            self._stop_headers_timer()
        elif self._headers_timer is None and self.conn.our_state is h11.IDLE:
            # the first bytes of another request end the keep-alive time, and begin this one
            self._headers_timer = self._later(self.limits.header_timeout, self._drop_slow)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_answering:  # a request that came with the one before
            self._stop_headers_timer()
        elif self.conn.trailing_data[0] and not self.transport.is_closing():
            self._headers_timer = self._later(self.limits.header_timeout, self._drop_slow)

    def _drop_slow(self) -> None:
        self._headers_timer = None
        if not self.transport.is_closing():
            if self.conn.our_state is h11.IDLE:
                seconds = self.limits.header_timeout
                late = ApiError(408, f"the headers were not complete in {seconds:g} s", code="timeout")
                self.transport.write(_answer(late))
            self.transport.close()

    def _stop_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    # a client that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._write_timer = self._later(self.limits.send_timeout, self._check_progress)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _check_progress(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent >= self._unsent:
            self._write_timer = None
            self.transport.abort()
            return
        self._unsent = unsent
        self._write_timer = self._later(self.limits.send_timeout, self._check_progress)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _later(self, seconds: float, action: Callable[[], object]) -> asyncio.TimerHandle | None:
        return self.loop.call_later(seconds, action) if seconds > 0 else None
