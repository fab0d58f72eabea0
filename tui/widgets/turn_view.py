"""One turn of the conversation: a question, or an answer with its tokens and its receipt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Collapsible, Static

from ..clipboard import copy
from ..engine.outbox import Token
from .answer_markdown import AnswerMarkdown

# Told apart without colour as well: plain, dim, underlined.
KIND_STYLES = {"big": "", "little": "dim $success", "fallback": "bold underline $warning"}


class QuestionView(Static, can_focus=True):
    """What the user asked."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "edit", "Edit", id="question.edit", tooltip="Edit this question and send it again"),
        Binding("c", "copy", "Copy", id="question.copy", tooltip="Copy this question"),
    ]

    @dataclass
    class Edit(Message):
        """The user wants to edit the question at ``position``."""

        position: int

    def __init__(self, text: str, position: int) -> None:
        super().__init__(Content(text), classes="question")
        self.text = text
        self.position = position

    def action_edit(self) -> None:
        self.post_message(self.Edit(self.position))

    def action_copy(self) -> None:
        copy(self.app, self.text, "question")


class AnswerView(Vertical, can_focus=True):
    """What the model answered, as Markdown or as coloured tokens, and the receipt under it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "copy", "Copy", id="answer.copy", tooltip="Copy this answer"),
        Binding("b", "copy_code", "Copy block", id="answer.copy_code", tooltip="Copy its next code block"),
        Binding("t", "thoughts", "Thoughts", id="answer.thoughts", tooltip="Show or fold what it thought"),
        Binding(
            "r", "regenerate", "Regenerate", id="answer.regenerate", tooltip="Answer this question again"
        ),
    ]

    @dataclass
    class Regenerate(Message):
        """The user wants another answer in place of the one at ``position``."""

        position: int

    def __init__(self, position: int, *, coloured: bool) -> None:
        super().__init__(classes="answer")
        self.position = position
        self.text = ""
        self.tokens: list[Token] = []
        self._coloured = coloured
        self._next_block = 0
        self._shown = Content("")
        self._n_shown = 0
        self.thought = ""
        self.thought_text = Static("", classes="thought")
        self.thoughts = Collapsible(self.thought_text, title="thoughts", classes="thoughts")
        self.markdown = AnswerMarkdown(open_links=False)
        self.token_text = Static("", classes="tokens")
        self.receipt = Static("", classes="receipt")

    def compose(self) -> ComposeResult:
        yield self.thoughts
        yield self.markdown
        yield self.token_text
        yield self.receipt

    def on_mount(self) -> None:
        self._show_thoughts()
        self.colour(self._coloured)

    def add(self, tokens: Sequence[Token]) -> None:
        """Append tokens to the answer."""
        self.tokens += tokens
        text = "".join(token.text for token in tokens)
        self.text += text
        self.thought += "".join(token.reasoning for token in tokens)
        self._show_thoughts()
        if self._coloured:
            self._show_tokens()
        if text:
            self.markdown.write(text)

    async def restore(self, text: str, tokens: Sequence[Token], receipt: str) -> None:
        """Show an answer that was saved."""
        self.text, self.tokens = text, list(tokens)
        self.thought = "".join(token.reasoning for token in tokens)
        self._show_thoughts()
        await self.markdown.update(text)
        self.finish(receipt)
        self.colour(self._coloured)

    async def end_stream(self) -> None:
        """Wait until the whole text is drawn."""
        await self.markdown.written()

    def finish(self, receipt: str, *, failed: bool = False) -> None:
        """Put the receipt, or what went wrong, under the answer."""
        self.receipt.update(Content(receipt))
        self.receipt.set_class(failed, "failed")
        self.receipt.display = bool(receipt)

    def colour(self, coloured: bool) -> None:
        """Show tokens coloured by their pass, or Markdown."""
        self._coloured = coloured and (bool(self.tokens) or not self.text)
        self.markdown.display = not self._coloured
        self.token_text.display = self._coloured
        if self._coloured:
            self._show_tokens()

    def _show_tokens(self) -> None:
        new = [(token.text, KIND_STYLES.get(token.kind, "")) for token in self.tokens[self._n_shown :]]
        self._shown = Content.assemble(self._shown, *new)
        self._n_shown = len(self.tokens)
        self.token_text.update(self._shown)

    def _show_thoughts(self) -> None:
        self.thoughts.display = bool(self.thought)
        self.thought_text.update(Content(self.thought.strip()))

    def action_thoughts(self) -> None:
        if self.thought:
            self.thoughts.collapsed = not self.thoughts.collapsed

    def action_copy(self) -> None:
        copy(self.app, self.text, "answer")

    def action_copy_code(self) -> None:
        blocks = self.markdown.code_blocks()
        if not blocks:
            self.app.notify("this answer has no code block", severity="warning", timeout=2)
            return
        at = self._next_block % len(blocks)
        self._next_block = at + 1
        copy(self.app, blocks[at], f"code block {at + 1} of {len(blocks)}")

    def action_regenerate(self) -> None:
        self.post_message(self.Regenerate(self.position))
