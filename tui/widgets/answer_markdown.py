"""Markdown whose code blocks can be copied."""

from __future__ import annotations

import asyncio
from typing import Any

from textual import events
from textual.app import ComposeResult
from textual.content import Content
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownBlock, MarkdownFence

from ..clipboard import copy


class CopyFence(MarkdownFence):
    """A code block with a line to click on that copies it."""

    def compose(self) -> ComposeResult:
        yield CopyLine(self)
        yield from super().compose()

    def _copy_context(self, block: MarkdownBlock) -> None:
        # a streamed fence may begin with half of its language's name
        super()._copy_context(block)
        for line in self.query(CopyLine):
            line.name_block()


class CopyLine(Static):
    """Names the language of a block; a click copies the block."""

    def __init__(self, fence: CopyFence) -> None:
        super().__init__(classes="copy-line")
        self._fence = fence
        self.tooltip = "Copy this block"
        self.name_block()

    def name_block(self) -> None:
        """Say the language that the block has now."""
        self.update(Content(f"{self._fence.lexer or 'code'} · copy"))

    def on_click(self, event: events.Click) -> None:
        event.stop()
        copy(self.app, self._fence.code.rstrip("\n"), "code block")


_BLOCKS = Markdown.BLOCKS | {"fence": CopyFence, "code_block": CopyFence}


class AnswerMarkdown(Markdown):
    """An answer's text, which may come in pieces.

    Not by ``Markdown.get_stream()``: stopping that cancels an append on its way, and one that begins before
    the other is through parses from the wrong line.
    """

    BLOCKS = _BLOCKS

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._pieces: list[str] = []
        self._writer: asyncio.Task[None] | None = None

    def write(self, text: str) -> None:
        """Append a piece; what comes faster than it can be drawn is drawn at once."""
        self._pieces.append(text)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while self._pieces and self.is_attached:
            text = "".join(self._pieces)
            self._pieces.clear()
            await self.append(text)

    async def written(self) -> None:
        """Wait until all pieces are drawn."""
        while self._writer is not None and not self._writer.done():
            await self._writer

    def code_blocks(self) -> list[str]:
        """The code of all blocks, in order."""
        return [fence.code.rstrip("\n") for fence in self.query(CopyFence)]
