"""Markdown whose code blocks can be copied."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownFence

from ..clipboard import copy


class CopyFence(MarkdownFence):
    """A code block with a line to click on that copies it."""

    def compose(self) -> ComposeResult:
        yield CopyLine(self)
        yield from super().compose()


class CopyLine(Static):
    """Names the language of a block; a click copies the block."""

    def __init__(self, fence: CopyFence) -> None:
        super().__init__(f"{fence.lexer or 'code'} · copy", classes="copy-line")
        self._fence = fence
        self.tooltip = "Copy this block"

    def on_click(self, event: events.Click) -> None:
        event.stop()
        copy(self.app, self._fence.code.rstrip("\n"), "code block")


class AnswerMarkdown(Markdown):
    """An answer's text."""

    BLOCKS: ClassVar = {**Markdown.BLOCKS, "fence": CopyFence, "code_block": CopyFence}

    def code_blocks(self) -> list[str]:
        """The code of all blocks, in order."""
        return [fence.code.rstrip("\n") for fence in self.query(CopyFence)]
