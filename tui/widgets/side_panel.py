"""The view on the experts: the map, its legend, what is resident, and two gauges."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from mobile_gguf.engine.experts import Asked
from mobile_gguf.sizes import format_bytes

from ..engine.expert_state import ExpertState
from ..engine.outbox import Token
from .expert_map import DEVICE_LEGEND, GLYPHS, LEGEND, NAMES, STYLES, ExpertMap
from .gauge import Gauge

# The legend's colours, by component class of the map.
_COLOURS = {
    "expert-map--absent": "$text-muted",
    "expert-map--host": "$primary",
    "expert-map--device": "#b07fd8",
    "expert-map--hit": "$success",
    "expert-map--device-hit": "#e0a0ff",
    "expert-map--loading": "$warning",
    "expert-map--miss": "$error",
}


_TITLE = "experts "


class SidePanel(Vertical):
    """Shows one model's experts; ``state`` is None without an expert store."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state: ExpertState | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="residency")
        yield ExpertMap(id="expert-map")
        with Vertical(id="gauges"):
            yield Static(id="legend")
            yield Gauge("tok/s", lambda value: f"{value:.1f}", id="speed")
            yield Gauge("read/token", lambda value: format_bytes(round(value)), id="bytes")

    def on_resize(self) -> None:
        """The legend is laid out for the width there is."""
        self.call_after_refresh(self.redraw)

    def set_state(self, state: ExpertState | None) -> None:
        """Show another model's experts."""
        self.state = state
        self.query_one(ExpertMap).state = state
        for gauge in self.query(Gauge):
            gauge.clear()
        self.redraw()

    def add_tokens(self, tokens: Sequence[Token], asked: Sequence[Asked | None]) -> None:
        """Take in tokens and what they asked for."""
        if self.state is not None:
            for item in asked:
                if item:
                    self.state.next_token(item)
        timed = [token for token in tokens if token.kind]
        self.query_one("#speed", Gauge).add([1 / token.seconds for token in timed if token.seconds > 0])
        self.query_one("#bytes", Gauge).add([float(token.n_bytes) for token in timed])

    def set_rate(self, tokens_per_second: float) -> None:
        """The answer's tokens per second so far, the number that the title and the receipt have too."""
        self.query_one("#speed", Gauge).latest = tokens_per_second

    def redraw(self) -> None:
        """Draw the map and its figures as the state now is."""
        self.query_one(ExpertMap).refresh_cells()
        self.query_one("#residency", Static).update(self._residency())
        self.query_one("#legend", Static).update(self._legend())

    def _residency(self) -> Content:
        if self.state is None:
            return Content("experts: no store")
        counts = self.state.counts()
        total = self.state.host.size
        if self.state.device is None:
            parts = [f"{counts['host']} of {total} in RAM"]
        else:
            parts = [f"{total}: {counts['device']} on device", f"{counts['host']} in RAM"]
        if counts["bytes"] and self.state.device is None:  # with a device the line has no room for it
            parts.append(format_bytes(counts["bytes"]))
        if n := counts["loading"]:
            width = self.query_one("#residency").content_size.width
            whole = ", ".join([*parts, f"{n} loading"])
            fits = width <= 0 or len(_TITLE + whole) <= width
            parts.append(f"{n} loading" if fits else f"+{n}")  # the legend has the sign
        return Content.assemble((_TITLE, "bold"), ", ".join(parts))

    def _legend(self) -> Content:
        has_device = self.state is not None and self.state.device is not None
        parts: list[Content] = []
        width = self.query_one("#legend").content_size.width
        for cell in DEVICE_LEGEND if has_device else LEGEND:
            colour = _COLOURS[STYLES[cell]]
            name = NAMES[cell].removeprefix("in ").removeprefix("on ").removeprefix("a ")
            parts.append(Content.assemble((GLYPHS[cell], colour), f" {name}"))
        return Content("\n").join(Content("  ").join(line) for line in _lines(parts, width))


def _lines(parts: list[Content], width: int) -> list[list[Content]]:
    """The parts in lines of at most ``width``, two spaces between them, none broken; 0: not laid out yet."""
    if width <= 0:
        return [parts]
    lines: list[list[Content]] = [[]]
    room = width
    for part in parts:
        if lines[-1] and part.cell_length + 2 > room:
            lines.append([])
            room = width + 2
        room -= part.cell_length + (2 if lines[-1] else 0)
        lines[-1].append(part)
    return lines
