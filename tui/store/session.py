"""The conversation on the screen: its turns, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..engine.outbox import Token
from .conversations import ConversationStore, StoreError, Turn, export_markdown, shorten


class Session:
    """One conversation at a time over a store; what cannot be saved is told once and stays in memory."""

    def __init__(self, store: ConversationStore, warn: Callable[[str], None] = lambda _text: None) -> None:
        self.store = store
        self._warn = warn
        self.id: int | None = None
        self.title = ""
        self.system = ""
        self.turns: list[Turn] = []
        self._warned = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns as a chat template takes them, the system message first."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, *({"role": turn.role, "content": turn.content} for turn in self.turns)]

    def new(self) -> None:
        """Begin another conversation; the system message stays."""
        self.id, self.title, self.turns = None, "", []

    def open(self, conversation: int) -> None:
        """Continue a saved conversation. Raises StoreError."""
        title, system, turns = self.store.open(conversation)
        self.id, self.title, self.system, self.turns = conversation, title, system, turns

    def ask(self, text: str, model: str) -> None:
        """Add a question."""
        if self.id is None:
            self.title = self.title or shorten(text)
            self._try(lambda: self._create(model))
        self._add(Turn("user", text))

    def answer(self, text: str, receipt: str, tokens: list[Token], model: str) -> None:
        """Add an answer, whole or as far as it came."""
        self._add(Turn("assistant", text, receipt, tokens, model))

    def cut(self, position: int) -> None:
        """Forget the turns from ``position`` on."""
        del self.turns[position:]
        if self.id is not None:
            conversation = self.id
            self._try(lambda: self.store.cut(conversation, position))

    def last_question(self) -> int | None:
        """The position of the user's last turn."""
        return next((i for i in reversed(range(len(self.turns))) if self.turns[i].role == "user"), None)

    def set_system(self, text: str) -> None:
        """Set the system message; empty removes it."""
        self.system = text
        if self.id is not None:
            conversation = self.id
            self._try(lambda: self.store.set_system(conversation, text))

    def rename(self, title: str) -> None:
        """Give the conversation another title."""
        self.title = shorten(title)
        if self.id is not None:
            conversation = self.id
            self._try(lambda: self.store.rename(conversation, title))

    def markdown(self) -> str:
        """The conversation as Markdown."""
        return export_markdown(self.title or "Untitled", self.system, self.turns)

    def _create(self, model: str) -> None:
        self.id = self.store.create(self.title, model, self.system)

    def _add(self, turn: Turn) -> None:
        self.turns.append(turn)
        if self.id is not None:
            conversation, position = self.id, len(self.turns) - 1
            self._try(lambda: self.store.append(conversation, position, turn))

    def _try(self, save: Callable[[], None]) -> None:
        try:
            save()
        except StoreError as error:
            if not self._warned:
                self._warn(f"not saved: {error}")
            self._warned = True
