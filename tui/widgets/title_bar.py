"""The first line: the model, its mode, how full the context is, and what is going on."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget


class TitleBar(Widget):
    """One line; what does not fit is cut from the right of the model's name."""

    model: reactive[str] = reactive("no model")
    detail: reactive[str] = reactive("")
    activity: reactive[str] = reactive("")

    def render(self) -> Content:
        room = self.size.width - 2
        right = self.activity or self.detail
        left = self.model
        space = room - len(left) - len(right)
        if space < 1:
            left = left[: max(0, room - len(right) - 2)] + "…"
            space = max(1, room - len(left) - len(right))
        style = "bold $warning" if self.activity else "$text-muted"
        return Content.assemble(" ", (left, "bold"), " " * space, (right, style))
