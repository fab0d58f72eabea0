"""The list of ways in which a command may go on, above the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from ..commands.slash import Completion


class CompletionList(OptionList, can_focus=False):
    """Shows completions; the prompt keeps the focus and passes on the keys that belong here."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.completions: list[Completion] = []

    def show(self, completions: Sequence[Completion]) -> bool:
        """Show these, or hide if there are none; returns whether there are."""
        self.completions = list(completions)
        self.clear_options()
        width = max((len(item.shown) for item in completions), default=0)
        for item in completions:
            text = Content.assemble(item.shown.ljust(width), "  ", (item.help, "$text-muted"))
            self.add_option(Option(text))
        self.display = bool(completions)
        if completions:
            self.highlighted = 0
        return bool(completions)

    def move(self, step: int) -> None:
        """Highlight the next (1) or previous (-1) one, around the ends."""
        if self.completions:
            self.highlighted = ((self.highlighted or 0) + step) % len(self.completions)

    @property
    def chosen(self) -> Completion | None:
        """The highlighted completion."""
        at = self.highlighted
        return self.completions[at] if at is not None and at < len(self.completions) else None
