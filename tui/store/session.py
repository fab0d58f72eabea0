"""The conversation on the screen: its turns, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mobile_gguf.api.attached_files import folded
from mobile_gguf.api.messages import as_answer

from ..engine.outbox import Token
from .conversations import ConversationStore, StoreError, Turn, export_markdown, shorten

_CUT = "cut: the chat ended here"


def _message(turn: Turn) -> dict[str, Any]:
    if turn.role == "assistant":
        return as_answer(turn.content, "".join(token.reasoning for token in turn.tokens))
    return {"role": turn.role, "content": turn.content}


class Session:
    """One conversation at a time over a store.

    What cannot be saved stays in memory; ``warn`` hears why, and None once all is saved after all.
    """

    def __init__(
        self, store: ConversationStore, warn: Callable[[StoreError | None], None] = lambda _error: None
    ) -> None:
        self.store = store
        self._warn = warn
        self.id: int | None = None
        self.title = ""
        self.system = ""
        self.turns: list[Turn] = []
        self._is_named = False  # the title is not that of the first question
        self._behind = False  # the store lacks something

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns as a chat template takes them, the system message first.

        What the model thought is given to the template, which says whether it is of use.
        """
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, *map(_message, self.turns)]

    def new(self) -> None:
        """Begin another conversation; the system message stays."""
        self.id, self.title, self.turns = None, "", []
        self._is_named = False

    def open(self, conversation: int) -> None:
        """Continue a saved conversation. Raises StoreError."""
        title, system, turns = self.store.open(conversation)
        self.id, self.title, self.system, self.turns = conversation, title, system, turns
        self._is_named = bool(turns) and title != _title_of(turns[0].content)
        self._behind = False

    def ask(self, text: str, model: str) -> None:
        """Add a question."""
        if self.id is None:
            self.title = self.title or _title_of(text)
        self._add(Turn("user", text, model=model))

    def draft(self, text: str, tokens: list[Token], model: str) -> None:
        """Save an answer as far as it has come; ``answer``, or ``cut``, takes its place."""
        turn = Turn("assistant", text, _CUT, tokens, model)
        self._save(lambda: self.store.append(self._saved_id(), len(self.turns), turn))

    def answer(self, text: str, receipt: str, tokens: list[Token], model: str) -> None:
        """Add an answer, whole or as far as it came."""
        self._add(Turn("assistant", text, receipt, tokens, model))

    def cut(self, position: int) -> None:
        """Forget the turns from ``position`` on; without any, and a name, the conversation as well."""
        del self.turns[position:]
        if not self.turns and not self._is_named:
            forgotten, self.id, self.title = self.id, None, ""
            if forgotten is not None:
                self._save(lambda: self.store.delete(forgotten))
        elif self.id is not None:
            self._save(lambda: self.store.cut(self._saved_id(), position))

    def last_question(self) -> int | None:
        """The position of the user's last turn."""
        return next((i for i in reversed(range(len(self.turns))) if self.turns[i].role == "user"), None)

    def set_system(self, text: str) -> None:
        """Set the system message; empty removes it."""
        self.system = text
        if self.id is not None:
            self._save(lambda: self.store.set_system(self._saved_id(), text))

    def rename(self, title: str) -> None:
        """Give the conversation another title."""
        self.title, self._is_named = shorten(title), True
        if self.id is not None:
            self._save(lambda: self.store.rename(self._saved_id(), title))

    def markdown(self) -> str:
        """The conversation as Markdown."""
        return export_markdown(self.title or "Untitled", self.system, self.turns)

    def move_to(self, store: ConversationStore) -> None:
        """Save the whole conversation in another store, and go on there."""
        self.store, self.id = store, None
        self.save_all()

    def save_all(self) -> None:
        """Save the whole conversation anew, if there is one."""
        if self.turns:
            self._behind = True
            self._save(lambda: None)

    def _add(self, turn: Turn) -> None:
        self.turns.append(turn)
        position = len(self.turns) - 1
        self._save(lambda: self.store.append(self._saved_id(), position, turn))

    def _saved_id(self) -> int:
        if self.id is None:
            first = self.turns[0].model if self.turns else ""
            self.id = self.store.create(self.title or "Untitled", first, self.system)
        return self.id

    def _save(self, step: Callable[[], None]) -> None:
        """Do ``step``; what could not be saved before goes first."""
        try:
            if self._behind:
                self._catch_up()
            step()
        except StoreError as error:
            self._behind = True
            self._warn(error)

    def _catch_up(self) -> None:
        if self.turns or self.id is not None:
            conversation = self._saved_id()
            self.store.rename(conversation, self.title or "Untitled")
            self.store.set_system(conversation, self.system)
            self.store.cut(conversation, 0)
            for position, turn in enumerate(self.turns):
                self.store.append(conversation, position, turn)
        self._behind = False
        self._warn(None)


def _title_of(question: str) -> str:
    return shorten(folded(question))
