"""What the chat shows around its transcript: the expert map, coloured tokens and the title."""

from __future__ import annotations

import time
from typing import Any

from mobile_gguf.options.words import AUTO_MODE

from ..widgets.side_panel import SidePanel
from ..widgets.title_bar import TitleBar
from ..widgets.turn_view import AnswerView
from .chat_state import ANSWERING, ChatState
from .map import MapScreen

_WIDE = 100  # columns from which on the map stands beside the chat
# A lower window has no room for a map above the chat: it would push out the prompt.
_LEAST_LINES = 20


class ChatView(ChatState):
    """Draws what the chat screen knows; owns nothing."""

    @property
    def _map_shown(self) -> bool:
        return bool(self.query_one(SidePanel).display)

    def on_resize(self) -> None:
        self.call_after_refresh(self._update_map_shown)

    def _update_map_shown(self) -> None:
        wide = self.size.width >= _WIDE
        wanted = wide if self._map_wanted is None else self._map_wanted
        self.query_one(SidePanel).display = wanted and self._has_room_for_map
        self.app.engine.watching = self._map_shown or self.app.map_open

    @property
    def _has_room_for_map(self) -> bool:
        return self.size.width >= _WIDE or self.size.height >= _LEAST_LINES

    def action_toggle_map(self) -> None:
        """Show or hide the expert map; on the whole screen where there is no room for both."""
        if not self._has_room_for_map:
            self.action_full_map()
            return
        self._map_wanted = not self._map_shown
        self._update_map_shown()
        self._read_places()

    def action_full_map(self) -> None:
        """The whole expert map."""
        self.app.push_screen(MapScreen(), lambda _result: self._update_map_shown())

    def action_toggle_tokens(self) -> None:
        """Show tokens coloured by their pass, or Markdown."""
        self.coloured = not self.coloured
        for view in self.query(AnswerView):
            view.colour(self.coloured)
        if self.coloured:
            self.notify("big plain, little dim, fallback underlined; Ctrl-T back to Markdown", timeout=4)

    def _tick(self) -> None:
        if self.busy and (self._map_shown or self.app.map_open):
            self._read_places()
        if self.state == ANSWERING and self._answer is not None and not self._answer.tokens:
            self._say_prompt()

    def _say_prompt(self) -> None:
        waited = time.monotonic() - self._started
        parts = [self._prompt_done, f"{waited:.0f} s" if waited >= 1 else ""]
        said = ", ".join(filter(None, parts))
        self.query_one(TitleBar).activity = f"reading the prompt{said and ': '}{said} · Esc stops"

    def _read_places(self) -> None:
        panel = self.query_one(SidePanel)
        places = self.app.engine.places()
        if panel.state is not None and places is not None:
            panel.state.set_places(places)
        panel.redraw()

    def _update_title(self) -> None:
        title = self.query_one(TitleBar)
        if not self.busy:
            title.activity = ""
        title.model = self.model_name or self._wanted or "no model"
        if not self.facts:
            title.detail = "Ctrl-O picks a model"
            return
        mode = self.facts["mode"] and (self.app.settings.value("mode") or self.facts["mode"])
        experts = _share_in_memory(self.facts.get("store"))
        room = f"/{self.facts['n_ctx']}" if self.facts["n_ctx"] else ""
        used = f" · {self.context_used}{room} tokens" if self.context_used else ""
        where = f" · at {self.facts['server']}" if "server" in self.facts else ""
        spent = f" {self.facts['spent']}" if mode == AUTO_MODE and self.facts.get("spent") else ""
        detail = f"{mode}{spent}{experts}{where}{self.app.jobs_note()}{used}"
        title.detail = detail.removeprefix(" · ")


def _share_in_memory(store: dict[str, Any] | None) -> str:
    """How many of the experts the budget has room for, for the title; empty without an expert store."""
    if not store or not store.get("expert_bytes"):
        return ""
    budget, total = store["budget_bytes"], store["expert_bytes"]
    if budget == 0 or budget >= total:
        return " · RAM for all experts"
    return f" · RAM for {min(99, round(100 * budget / total))}% of experts"
