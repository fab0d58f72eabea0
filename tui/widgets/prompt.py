"""The prompt: several lines, a history, and completion of commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from ..commands.slash import Completion

_NEWLINE_KEYS = ("shift+enter", "ctrl+enter", "alt+enter", "ctrl+j")


class Prompt(TextArea):
    """Enter sends; shift, ctrl or alt with Enter, Ctrl-J, or a backslash before Enter begin a new line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send", id="prompt.submit", tooltip="Send the prompt", show=False),
        Binding(
            ",".join(_NEWLINE_KEYS),
            "newline",
            "New line",
            id="prompt.newline",
            tooltip="Begin a new line",
            show=False,
        ),
        # Ctrl-Z, which a text area has for this, suspends
        Binding(
            "ctrl+underscore,super+z",
            "undo",
            "Undo",
            id="prompt.undo",
            tooltip="Undo in the prompt; Ctrl-Y does it again",
            show=False,
        ),
    ]

    @dataclass
    class Submitted(Message):
        """The user sent ``text``."""

        text: str

    @dataclass
    class CompletionKey(Message):
        """A key for the list of completions: up, down, tab, enter or escape."""

        key: str

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, soft_wrap=True, show_line_numbers=False, tab_behavior="focus")
        self.highlight_cursor_line = False
        # F6 and F7 select text in a text area, but belong to the screen here
        for key in ("f6", "f7"):
            self._bindings.key_to_bindings.pop(key, None)
        self.completing = False
        self.completer: Callable[[str], Sequence[Completion]] = lambda _text: ()
        self.prompts: list[str] = []
        self._at: int | None = None
        self._draft = ""

    async def _on_key(self, event: events.Key) -> None:
        key = event.key
        # Keys may come faster than the screen hears of them: what Enter does is decided here.
        if key == "enter" and self.completing and self._is_complete():
            self._swallow(event)
            self.action_submit()
        elif self.completing and key in ("up", "down", "tab", "escape", "enter"):
            self._swallow(event)
            self.post_message(self.CompletionKey(key))
        elif key == "enter":
            self._swallow(event)
            self.action_submit()
        elif key in _NEWLINE_KEYS:
            self._swallow(event)
            self.action_newline()
        elif self._recalls(key):
            self._swallow(event)
        else:
            await super()._on_key(event)

    def _is_complete(self) -> bool:
        """Whether nothing could be added to the command that is typed, or nothing need be."""
        found = self.completer(self.text)
        return not found or any(self.text == completion.line.rstrip() for completion in found)

    def _recalls(self, key: str) -> bool:
        """Whether an arrow at the edge of the text has moved through the history."""
        row = self.cursor_location[0]
        if key == "up" and row == 0:
            return self.recall(-1)
        return key == "down" and row == self.document.line_count - 1 and self.recall(1)

    def _swallow(self, event: events.Key) -> None:
        event.stop()
        event.prevent_default()

    def action_submit(self) -> None:
        """Send the text, or begin a new line after a backslash."""
        row, column = self.cursor_location
        before = self.document.get_line(row)[:column]
        if before.endswith("\\"):
            self.delete((row, column - 1), (row, column))
            self.action_newline()
            return
        text = self.text.strip()
        if text:
            self.put("")
            self.post_message(self.Submitted(text))

    def give_back(self, text: str) -> None:
        """Put back a text that could not be sent, before what has been typed since."""
        self.put(f"{text}\n{self.text}" if self.text else text)

    def action_newline(self) -> None:
        """Begin a new line."""
        self.insert("\n")

    def put(self, text: str) -> None:
        """Replace the text, the cursor at its end."""
        self.load_text(text)
        self.move_cursor(self.document.end)

    def remember(self, text: str) -> None:
        """Add a prompt to the history and start at its end again."""
        if not self.prompts or self.prompts[-1] != text:
            self.prompts.append(text)
        self._at = None

    def recall(self, step: int) -> bool:
        """Show the previous (-1) or next (1) prompt of the history; False if there is none."""
        at = len(self.prompts) if self._at is None else self._at
        if not 0 <= at + step <= len(self.prompts):
            return False
        if self._at is None:
            if step > 0:
                return False
            self._draft = self.text
        at += step
        self._at = at if at < len(self.prompts) else None
        self.put(self.prompts[at] if self._at is not None else self._draft)
        return True
