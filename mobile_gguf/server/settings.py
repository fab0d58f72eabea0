"""How a server behaves: what it takes, how long it waits, whom it lets in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server; bytes and seconds, 0 for a timeout that never comes.

    ``queue`` requests may wait while one is answered. ``names`` are the model's names to clients, the first
    being the one it is listed under. ``defaults`` are GenerateOptions for what a request does not say.
    ``hosts`` are the Host headers that are let in; empty: any. ``origins`` are those CORS is on for.
    ``pooling`` makes embeddings of a model whose file does not say how; None: there are none of it.
    """

    names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    queue: int = 32
    max_request_bytes: int = 4 << 20
    timeout: float = 0.0
    body_timeout: float = 30.0
    grace: float = 10.0
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    pooling: str | None = None
