"""Tokens on their way from the engine thread to the screen."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from mobile_gguf.engine.experts import Asked


@dataclass(frozen=True)
class Token:
    """One token as the transcript keeps it: its text, the pass it came from, its time and its bytes.

    ``reasoning`` is what it adds to the model's thoughts.
    """

    text: str
    kind: str  # big, little or fallback; empty where no token came
    seconds: float = 0.0
    n_bytes: int = 0
    reasoning: str = ""


@dataclass
class Outbox:
    """What the engine thread has produced and the screen has not taken; safe in both threads."""

    answer_id: int
    _tokens: list[Token] = field(default_factory=list)
    _asked: list[Asked | None] = field(default_factory=list)
    tokens_per_second: float = 0.0  # of the answer so far, as its receipt will have it
    _announced: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, token: Token, asked: Asked | None, tokens_per_second: float = 0.0) -> bool:
        """Add a token; True if the screen must be told, False if a message is on its way already."""
        with self._lock:
            self._tokens.append(token)
            self._asked.append(asked)
            self.tokens_per_second = tokens_per_second
            announced, self._announced = self._announced, True
            return not announced

    def take(self) -> tuple[list[Token], list[Asked | None]]:
        """Everything since the last call: tokens, and for each the experts that were asked for meanwhile."""
        with self._lock:
            taken = self._tokens, self._asked
            self._tokens, self._asked, self._announced = [], [], False
            return taken
