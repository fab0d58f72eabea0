"""What the workers tell the screen: dataclass messages, and nothing else crosses between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from textual.message import Message

from mobile_gguf.generate.answer.receipt import Receipt

from .outbox import Outbox

if TYPE_CHECKING:
    from mobile_gguf.engine.experts import Experts
    from mobile_gguf.remote.experts import RemoteExperts


@dataclass
class LoadProgressed(Message):
    """Loading has come so far; ``share`` is 0 to 1."""

    phase: str
    share: float


@dataclass
class ModelFound(Message):
    """A reference was looked at before its load: ``error`` is why it cannot be loaded, if so."""

    reference: str
    error: str


@dataclass
class ModelLoaded(Message):
    """A model is ready."""

    reference: str
    name: str
    expert_bytes: list[int]  # of one expert, by layer; empty where there is no map
    facts: dict[str, Any]
    notices: list[str]
    experts: Experts | RemoteExperts
    sampling: dict[str, Any] = field(default_factory=dict)  # what its file asks for
    number: int = 0  # of the load, as it was asked for


@dataclass
class LoadFailed(Message):
    """A model could not be loaded, or loading was cancelled."""

    reference: str
    error: str
    cancelled: bool = False
    keeps_model: bool = False  # the one that was there before still is
    about_option: bool = False  # which here is a setting
    number: int = 0  # of the load, as it was asked for


@dataclass
class PromptProgressed(Message):
    """So many tokens of the prompt are computed, of so many."""

    answer_id: int
    done: int
    total: int


@dataclass
class AnswerProgressed(Message):
    """Tokens wait in ``outbox``; one message announces as many as there are when it is handled."""

    outbox: Outbox


@dataclass
class AnswerEnded(Message):
    """The answer is over: ``finish_reason`` as in a Chunk, or ``error`` with its text.

    ``facts`` are the model's, as they are now.
    """

    answer_id: int
    finish_reason: str
    receipt: Receipt | None
    tokens_per_second: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
