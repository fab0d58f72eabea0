"""A modal screen with a box in the middle; Escape closes it."""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar

from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from .steady import SteadyScreen

Result = TypeVar("Result")

# A screen's class, by the columns from which on it has it.
NARROW_OR_WIDE: list[tuple[int, str]] | None = [(0, "-narrow"), (100, "-wide")]


class Dialog(SteadyScreen[Result], ModalScreen[Result], Generic[Result]):
    """Base of the modal screens."""

    HORIZONTAL_BREAKPOINTS = NARROW_OR_WIDE
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="dialog.close", tooltip="Close this window")
    ]

    def action_close(self) -> None:
        """Close without a result."""
        self.dismiss(None)
