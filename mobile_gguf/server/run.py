"""Serving with uvicorn: the socket, the signals, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from mobile_gguf.api.model import Model
from mobile_gguf.errors import MobileError

from .app import create_app
from .settings import ServerSettings


def serve(
    model: Model,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    announce: Callable[[str], object] = lambda _url: None,
    stopping: Callable[[], object] = lambda: None,
    log_requests: bool = False,
) -> int | None:
    """Serve ``model`` until a signal comes; returns the signal.

    ``announce`` is called with the address once connections are taken, ``stopping`` if an answer is running
    when the first signal comes. The first SIGINT or SIGTERM stops
    taking requests and lets the running answer end within ``settings.grace`` seconds; a second one cuts it.
    Raises MobileError if the address cannot be had.
    """
    listening = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listening.getsockname()[1]}"
    # asyncio warns of every client that has gone; that is counted, and no news.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    server = make_server(
        model, settings, ready=lambda: announce(url), stopping=stopping, log_requests=log_requests
    )
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        listening.close()
    return server.signal


def make_server(
    model: Model,
    settings: ServerSettings,
    *,
    ready: Callable[[], object] = lambda: None,
    stopping: Callable[[], object] = lambda: None,
    log_requests: bool = False,
) -> Server:
    """A uvicorn server for ``model``; ``ready`` and ``stopping`` are called as ``serve`` says."""
    config = uvicorn.Config(
        create_app(model, settings),
        log_level="info" if log_requests else "warning",
        access_log=log_requests,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.grace) + 10,
        server_header=False,
        ws="none",
        lifespan="on",
    )
    return Server(config, ready, stopping)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises MobileError if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        raise MobileError(f"cannot listen on {host}:{port}: {error}") from None


class Server(uvicorn.Server):
    """uvicorn's server that closes the application before it waits for its connections."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], object], stopping: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self.signal: int | None = None
        self._ready = ready
        self._stopping = stopping
        self._closing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        serving = app.state.serving  # type: ignore[union-attr]
        self._closing = asyncio.create_task(serving.close())
        await super().shutdown(sockets=sockets)
        await self._closing
        if self.force_exit:
            # uvicorn leaves it waiting then, and logs a traceback when the loop ends
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear SIGINT and SIGTERM, and give them back their handlers; uvicorn would raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends the server in order; a second one cuts the running answer."""
        serving = self.config.app.state.serving  # type: ignore[union-attr]
        if self.should_exit:
            serving.worker.cancel_running()
            self.force_exit = True
        elif serving.worker.is_busy:
            self._stopping()
        self.signal = sig
        self.should_exit = True
