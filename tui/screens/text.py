"""A text to read."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Footer, Static

from .dialog import Dialog


class TextScreen(Dialog[None]):
    """Shows a text under a title; scrolls."""

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = self._title
            with VerticalScroll():
                yield Static(Content(self._text))
        yield Footer(show_command_palette=False)
