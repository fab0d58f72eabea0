"""A screen that is resized many times at once and comes to rest."""

from __future__ import annotations

from typing import Generic, TypeVar

from textual import events, on
from textual.screen import Screen

Result = TypeVar("Result")


class SteadyScreen(Screen[Result], Generic[Result]):
    """Base of all screens: what it hears of a size that is no longer the terminal's, it passes over.

    A screen of Textual's answers a resize by sending itself another one of the same size. Two sizes on their
    way at once, as when a window is dragged while the processor is busy, would follow each other for ever.
    """

    @on(events.Resize)
    def _pass_over_a_former_size(self, event: events.Resize) -> None:
        if event.size != self.app.size:
            event.prevent_default()  # Textual's own handler does not get it
