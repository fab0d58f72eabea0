"""The expert map on a screen of its own, as large as it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer

from ..widgets.expert_map import ExpertMap
from ..widgets.gauge import Gauge
from ..widgets.side_panel import SidePanel
from .steady import SteadyScreen

if TYPE_CHECKING:
    from ..app import ChatApp


class MapScreen(SteadyScreen[None]):
    """Shows the state of the chat's panel while the answer goes on."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f9,f6,ctrl+g,q", "close", "Back", id="map.close", tooltip="Back to the chat")
    ]
    app: ChatApp

    def compose(self) -> ComposeResult:
        yield SidePanel(id="full-map")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(SidePanel).set_state(self.app.chat.query_one("#experts", SidePanel).state)
        self.app.engine.watching = True
        self.set_interval(0.15, self._follow)

    def _follow(self) -> None:
        chat, own = self.app.chat.query_one("#experts", SidePanel), self.query_one(SidePanel)
        if own.state is not chat.state:
            own.set_state(chat.state)
        for name in ("#speed", "#bytes"):
            source, target = chat.query_one(name, Gauge), own.query_one(name, Gauge)
            target.values, target.latest = source.values, source.latest
            target.refresh()
        own.redraw()
        own.query_one(ExpertMap).refresh_cells()

    def action_close(self) -> None:
        """Back to the chat."""
        self.dismiss(None)
