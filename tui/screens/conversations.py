"""Saved conversations: search, open, rename, delete."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Footer, Input, OptionList
from textual.widgets.option_list import Option

from ..store.conversations import ConversationStore, StoreError, Summary, local_time
from .confirm import Confirm
from .dialog import Dialog


class Conversations(Dialog[int]):
    """The result is the conversation to open."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "focus_list", "List", id="conversations.list", tooltip="Go to the list", show=False),
        # before the box for the words, which has its own use for these keys
        Binding("ctrl+e", "rename", "Rename", id="conversations.rename", tooltip="Retitle it", priority=True),
        Binding("ctrl+d", "delete", "Delete", id="conversations.delete", tooltip="Delete it", priority=True),
    ]

    def __init__(self, store: ConversationStore, words: str = "") -> None:
        super().__init__()
        self._store = store
        self._words = words
        self._renaming: Summary | None = None
        self.found: list[Summary] = []

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Conversations"
            yield Input(self._words, placeholder="words to search for", id="words")
            yield OptionList(id="found")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self._search()

    @on(Input.Changed)
    def _changed(self) -> None:
        if self._renaming is None:
            self._search()

    def _search(self) -> None:
        problem = ""
        try:
            self.found = self._store.search(self.query_one(Input).value)
        except StoreError as error:
            self.found, problem = [], f"{error}; /save in the chat helps"
        options = self.query_one(OptionList)
        at = options.highlighted or 0
        options.clear_options()
        if problem:
            options.add_option(Option(Content(problem), disabled=True))
        for item in self.found:
            options.add_option(Option(_row(item), id=str(item.id)))
        if self.found:
            options.highlighted = min(at, len(self.found) - 1)

    @property
    def _chosen(self) -> Summary | None:
        at = self.query_one(OptionList).highlighted
        return self.found[at] if at is not None and at < len(self.found) else None

    def action_focus_list(self) -> None:
        """Go to the list."""
        self.query_one(OptionList).focus()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(int(event.option.id or 0))

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        if self._renaming is not None:
            renaming, title = self._renaming, event.value.strip()
            self._stop_renaming()
            if title:
                self._try_store(lambda: self._store.rename(renaming.id, title))
            self._search()
        elif self._chosen is not None:
            self.dismiss(self._chosen.id)

    def action_rename(self) -> None:
        """Type another title for the highlighted conversation."""
        chosen = self._chosen
        if chosen is None:
            return
        self._renaming = chosen
        box = self.query_one(Input)
        self._words = box.value
        with self.prevent(Input.Changed):
            box.value = chosen.title
        box.border_title = "new title"
        box.focus()

    def _stop_renaming(self) -> None:
        self._renaming = None
        box = self.query_one(Input)
        box.border_title = None
        with self.prevent(Input.Changed):
            box.value = self._words

    def action_delete(self) -> None:
        """Delete the highlighted conversation, after asking."""
        chosen = self._chosen
        if chosen is None:
            return

        def answered(sure: bool | None) -> None:
            if sure:
                self._try_store(lambda: self._store.delete(chosen.id))
                self._search()

        self.app.push_screen(Confirm(f"Delete “{chosen.title}”?"), answered)

    def _try_store(self, change: Callable[[], None]) -> None:
        try:
            change()
        except StoreError as error:
            self.notify(str(error), severity="error")

    def action_close(self) -> None:
        """Leave the title as it is, or close."""
        if self._renaming is not None:
            self._stop_renaming()
        else:
            self.dismiss(None)


def _row(item: Summary) -> Content:
    when = local_time(item.updated)
    turns = f"{item.n_turns} turn{'s' if item.n_turns != 1 else ''}"
    head = Content.assemble((item.title, "bold"), "\n  ", (f"{when}  {turns}", "$text-muted"))
    if not item.snippet:
        return head
    return Content.assemble(head, "\n  ", (" ".join(item.snippet.split()), "$text-muted"))
