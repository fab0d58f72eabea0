"""Serving with uvicorn: the socket, the signals, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from mobile_gguf.api.model import Model
from mobile_gguf.errors import MobileError
from mobile_gguf.sockets import claim_address
from mobile_gguf.wording import why

from .app import create_app
from .connections import protocol_of
from .serving import CUT_SECONDS, Serving
from .settings import ServerSettings

logger = logging.getLogger("mobile_gguf")

# For connections to end by themselves, once the model is at rest.
_CLOSE_SECONDS = 3
_STOPPED_BY_FORCE = 4


def serve(
    model: Model,
    settings: ServerSettings,
    bound: socket.socket,
    *,
    announce: Callable[[str], object] = lambda _url: None,
    stopping: Callable[[], object] = lambda: None,
    log_requests: bool = False,
) -> int | None:
    """Serve ``model`` on a socket from ``bind`` until a signal comes; returns the signal.

    ``announce`` is called with the address once connections are taken, ``stopping`` if an answer is running
    when the first signal comes. The first SIGINT or SIGTERM stops
    taking requests and lets the running answer end within ``settings.grace`` seconds; a second one cuts it.
    A model that cannot be stopped does not keep the process: it ends with a line on stderr and exit code 4.
    Raises MobileError if the address cannot be had any more.
    """
    # later it would hold up every client, and a signal
    model.prepare_constraints()
    listening = start_listening(bound)
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    # asyncio warns of every client that has gone; that is counted, and no news.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    server = make_server(
        model, settings, ready=lambda: announce(url), stopping=stopping, log_requests=log_requests
    )
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        listening.close()
        server.ended()
    if server.app_state.worker_left:
        _end_by_force()
    return server.signal


def _end_by_force() -> None:
    """End the process while the engine computes: nothing can be freed under it."""
    logger.error("the model could not be stopped: the server ends without it")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(_STOPPED_BY_FORCE)


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
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        server_header=False,
        ws="none",
        http=protocol_of(settings),
        lifespan="on",
    )
    return Server(config, ready, stopping, settings.grace)


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet, so that nobody connects while a model loads.

    Raises MobileError if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise MobileError(f"cannot listen on {host}:{port}: {why(error)}") from None
    made = socket.socket(family, kind, protocol)
    try:
        claim_address(made)
        made.bind(address)
    except OSError as error:
        made.close()
        raise MobileError(f"cannot listen on {host}:{port}: {why(error)}") from None
    return made


def start_listening(bound: socket.socket) -> socket.socket:
    """The socket, listening; raises MobileError if another took the port meanwhile."""
    try:
        bound.listen(512)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        bound.close()
        raise MobileError(f"cannot listen on {host}:{port}: {why(error)}") from None
    return bound


class Server(uvicorn.Server):
    """uvicorn's server that closes the application before it waits for its connections."""

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], object],
        stopping: Callable[[], object],
        grace: float,
    ) -> None:
        super().__init__(config)
        self.signal: int | None = None
        self._ready = ready
        self._stopping = stopping
        self._grace = grace
        self._last: list[threading.Timer] = []

    def ended(self) -> None:
        """The loop is over: what the model still writes may take its time."""
        for timer in self._last:
            timer.cancel()

    @property
    def app_state(self) -> Serving:
        """What the application knows of its model."""
        return self.config.app.state.serving  # type: ignore[union-attr]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # connections are taken meanwhile, and told that the server is shutting down
        await self.app_state.close()
        await super().shutdown(sockets=sockets)
        if self.force_exit:
            # uvicorn leaves it waiting then, and logs a traceback when the loop ends
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear SIGINT and SIGTERM, and give them back their handlers; uvicorn would raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        numbers += [signal.SIGBREAK] if sys.platform == "win32" else []  # Ctrl-Break, also by another process
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends the server in order; a second one cuts the running answer."""
        worker = self.app_state.worker
        if self.should_exit:
            worker.cancel_running()
            self.force_exit = True
        elif worker.is_busy:
            self._stopping()
        # whatever else does not end: connections, tasks, the loop
        seconds = CUT_SECONDS + 2 * _CLOSE_SECONDS + (0 if self.should_exit else self._grace)
        last = threading.Timer(seconds, _end_by_force)
        last.daemon = True
        last.start()
        self._last.append(last)
        self.signal = sig
        self.should_exit = True
