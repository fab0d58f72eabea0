"""What the workers tell the screen: dataclass messages, and nothing else crosses between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textual.message import Message

from ..receipt import Receipt

if TYPE_CHECKING:
    from ..gguf_info import GgufInfo
    from .engine_thread import Outbox


@dataclass(frozen=True)
class Token:
    """One token as the transcript keeps it: its text, the pass it came from, its time and its bytes."""

    text: str
    kind: str  # big, little or fallback; empty where no token came
    seconds: float = 0.0
    n_bytes: int = 0


@dataclass
class LoadProgressed(Message):
    """Loading has come so far; ``share`` is 0 to 1."""

    phase: str
    share: float


@dataclass
class ModelLoaded(Message):
    """A model is ready."""

    reference: str
    info: GgufInfo
    facts: dict[str, Any]
    notices: list[str]
    layers: list[int]  # those with routed experts


@dataclass
class LoadFailed(Message):
    """A model could not be loaded, or loading was cancelled."""

    reference: str
    error: str
    cancelled: bool = False


@dataclass
class AnswerProgressed(Message):
    """Tokens wait in ``outbox``; one message announces as many as there are when it is handled."""

    outbox: Outbox


@dataclass
class AnswerEnded(Message):
    """The answer is over: ``finish_reason`` as in a Chunk, or ``error`` with its text."""

    answer_id: int
    finish_reason: str
    receipt: Receipt | None
    tokens_per_second: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
