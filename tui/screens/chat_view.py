"""What the chat shows around its transcript: the expert map, coloured tokens and the title."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..widgets.side_panel import SidePanel
from ..widgets.title_bar import TitleBar
from ..widgets.turn_view import AnswerView

if TYPE_CHECKING:
    from .chat import ChatScreen

    Base = ChatScreen
else:
    Base = object

IDLE, LOADING, ANSWERING = "idle", "loading", "answering"


class ChatView:
    """Draws what the chat screen knows; owns nothing."""

    @property
    def _map_shown(self: Base) -> bool:
        return bool(self.query_one(SidePanel).display)

    def on_resize(self: Base) -> None:
        self.call_after_refresh(self._update_map_shown)

    def _update_map_shown(self: Base) -> None:
        wide = self.size.width >= 100
        self.query_one(SidePanel).display = wide if self._map_wanted is None else self._map_wanted
        self.app.engine.watching = self._map_shown or self.app.map_open

    def action_toggle_map(self: Base) -> None:
        """Show or hide the expert map."""
        self._map_wanted = not self._map_shown
        self._update_map_shown()
        self._read_residency()

    def action_toggle_tokens(self: Base) -> None:
        """Show tokens coloured by their pass, or Markdown."""
        self.coloured = not self.coloured
        for view in self.query(AnswerView):
            view.colour(self.coloured)
        if self.coloured:
            self.notify("big plain, little dim, fallback underlined; Ctrl-T back to Markdown", timeout=4)

    def _tick(self: Base) -> None:
        if self.busy and (self._map_shown or self.app.map_open):
            self._read_residency()
        if self.state == ANSWERING and self._answer is not None and not self._answer.tokens:
            waited = time.monotonic() - self._started
            if waited >= 1:
                self.query_one(TitleBar).activity = f"reading the prompt {waited:.0f} s · Esc stops"

    def _read_residency(self: Base) -> None:
        panel = self.query_one(SidePanel)
        residency = self.app.engine.residency()
        if panel.state is not None and residency is not None:
            panel.state.set_residency(*residency)
        panel.redraw()

    def _update_title(self: Base) -> None:
        title = self.query_one(TitleBar)
        title.activity = ""
        title.model = self.model_name or "no model"
        if not self.facts:
            title.detail = "Ctrl-O picks a model"
            return
        mode = self.app.settings.value("mode") or self.facts["mode"]
        used = f" · {self.context_used}/{self.facts['n_ctx']} tokens" if self.context_used else ""
        title.detail = f"{mode}{self.app.jobs_note()}{used}"
