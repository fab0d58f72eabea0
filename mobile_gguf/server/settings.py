"""How a server behaves: what it takes, how long it waits, whom it lets in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SMALL_REQUESTS = 2 << 20  # that go beside the largest one
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server; bytes and seconds, 0 for a timeout that never comes.

    ``queue`` requests may wait while one is answered. ``names`` are the model's names to clients, the first
    being the one it is listed under. ``defaults`` are GenerateOptions for what a request does not say.
    ``hosts`` are the Host headers that are let in; empty: any. With ``addresses`` every IP address is let in
    besides: nobody but its owner can lead a browser to one. ``origins`` are those CORS is on for.
    Connections: ``header_timeout`` for a request's headers, ``send_timeout`` without a byte that a client
    reads, ``max_connections`` at once; ``max_bytes`` of all requests' bodies together, 0: a little more than
    one's.
    ``pooling`` makes embeddings of a model whose file does not say how; None: there are none of it.
    ``strict`` refuses fields that nobody knows, which are left out with a note otherwise.
    """

    names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    queue: int = 32
    max_request_bytes: int = 4 << 20
    timeout: float = 0.0
    body_timeout: float = 30.0
    grace: float = 10.0
    header_timeout: float = 15.0
    send_timeout: float = 60.0
    max_connections: int = 256
    max_bytes: int = 0
    hosts: tuple[str, ...] = ()
    addresses: bool = False
    origins: tuple[str, ...] = ()
    pooling: str | None = None
    strict: bool = False

    @property
    def listed_names(self) -> tuple[str, ...]:
        """The names that are told to clients: paths are nobody's business."""
        return tuple(name for name in self.names if name == self.names[0] or not name.endswith(".gguf"))

    @property
    def all_bytes(self) -> int:
        """Bytes that the bodies of all requests may have together."""
        return self.max_bytes or self.max_request_bytes + _SMALL_REQUESTS
