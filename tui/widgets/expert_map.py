"""The expert map: a row for each layer, a column for each expert, a glyph for where it is and what it did."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from ..engine.expert_state import Cell, ExpertState, aggregate, spans

# Told apart by shape alone, so that the map works without colour.
GLYPHS = {
    Cell.ABSENT: "·",
    Cell.HOST: "░",
    Cell.DEVICE: "▓",
    Cell.OLD_HIT: "▒",
    Cell.OLD_MISS: "x",
    Cell.HIT: "█",
    Cell.DEVICE_HIT: "◆",
    Cell.LOADING: "+",
    Cell.MISS: "X",
}
STYLES = {
    Cell.ABSENT: "expert-map--absent",
    Cell.HOST: "expert-map--host",
    Cell.DEVICE: "expert-map--device",
    Cell.OLD_HIT: "expert-map--old-hit",
    Cell.OLD_MISS: "expert-map--old-miss",
    Cell.HIT: "expert-map--hit",
    Cell.DEVICE_HIT: "expert-map--device-hit",
    Cell.LOADING: "expert-map--loading",
    Cell.MISS: "expert-map--miss",
}
NAMES = {
    Cell.ABSENT: "on disk",
    Cell.HOST: "in RAM",
    Cell.DEVICE: "on a device",
    Cell.OLD_HIT: "hit a moment ago",
    Cell.OLD_MISS: "missed a moment ago",
    Cell.HIT: "hit",
    Cell.DEVICE_HIT: "device hit",
    Cell.LOADING: "loading",
    Cell.MISS: "missed",
}
LEGEND = (Cell.HIT, Cell.MISS, Cell.LOADING, Cell.HOST, Cell.ABSENT)
DEVICE_LEGEND = (Cell.HIT, Cell.DEVICE_HIT, Cell.MISS, Cell.LOADING, Cell.DEVICE, Cell.HOST, Cell.ABSENT)
_WIDEST_CELL = 8


class ExpertMap(Widget):
    """Draws an ExpertState in the room there is; experts or layers that do not fit share a cell."""

    COMPONENT_CLASSES = set(STYLES.values()) | {"expert-map--label"}

    state: reactive[ExpertState | None] = reactive(None)

    def refresh_cells(self) -> None:
        """Draw again after the state has changed."""
        self._cells = None
        self.refresh()

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._cells = None
        self._drawn_size = (0, 0)

    def watch_state(self) -> None:
        self.refresh_cells()

    @property
    def n_rows(self) -> int:
        """Lines that the map needs for every layer, its header among them."""
        return len(self.state.layers) + 1 if self.state is not None else 2

    def _label_width(self) -> int:
        return len(str(self.state.layers[-1])) + 1 if self.state is not None and self.state.layers else 0

    def _layout_cells(self) -> tuple[list[range], list[range], int, int]:
        """Experts of each column, layers (by place in the list) of each row, a cell's width, the label's."""
        state = self.state
        if state is None:
            return [], [], 1, 0
        label = self._label_width()
        columns = spans(state.host.shape[1], self.size.width - label)
        rows = spans(len(state.layers), self.size.height - 1)
        width = min(_WIDEST_CELL, max(1, (self.size.width - label) // max(1, len(columns))))
        return columns, rows, width, label

    def render_line(self, y: int) -> Strip:
        """One line of the map."""
        state, size = self.state, (self.size.width, self.size.height)
        if state is None or not state.layers or size[0] < 8 or size[1] < 2:
            text = "no expert store" if y == 0 else ""
            return Strip([Segment(text[: size[0]].ljust(size[0]), self._style("expert-map--label"))])
        if self._cells is None or self._drawn_size != size:
            room = size[0] - self._label_width()
            self._cells = aggregate(state.cells(), size[1] - 1, room)
            self._drawn_size = size
        columns, rows, width, label = self._layout_cells()
        if y == 0:
            return self._header(columns, rows, label)
        if y > len(self._cells):
            return Strip.blank(size[0], self.rich_style)
        layer = state.layers[rows[y - 1].start]
        segments = [Segment(f"{layer:>{label - 1}} ", self._style("expert-map--label"))]
        for value in self._cells[y - 1].tolist():
            cell = Cell(value)
            segments.append(Segment(GLYPHS[cell] * width, self._style(STYLES[cell])))
        return Strip(Segment.simplify(segments)).adjust_cell_length(size[0], self.rich_style)

    def _header(self, columns: list[range], rows: list[range], label: int) -> Strip:
        n_layer, n_expert = rows[-1].stop, columns[-1].stop
        shared = (
            f", {len(rows)} x {len(columns)} cells"
            if (len(rows), len(columns)) != (n_layer, n_expert)
            else ""
        )
        text = f"{n_layer} layers x {n_expert} experts{shared}"
        text = " " * label + text if label + len(text) <= self.size.width else text
        line = Strip([Segment(text, self._style("expert-map--label"))])
        return line.adjust_cell_length(self.size.width, self.rich_style)

    def _style(self, name: str) -> Style:
        return self.get_component_rich_style(name)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Say in a tooltip what is under the pointer."""
        self.tooltip = self.describe(event.x, event.y)

    def describe(self, x: int, y: int) -> str | None:
        """What the cell at ``x``, ``y`` holds; None beside the map."""
        state = self.state
        if state is None or not state.layers or y < 1:
            return None
        columns, rows, width, label = self._layout_cells()
        column, row = (x - label) // width, y - 1
        if x < label or row >= len(rows) or column >= len(columns):
            return None
        band, experts = rows[row], columns[column]
        layers = state.layers[band.start : band.stop]
        here = slice(band.start, band.stop), slice(experts.start, experts.stop)
        hits, misses = int(state.hits[here].sum()), int(state.misses[here].sum())
        value = aggregate(state.cells()[here], 1, 1)[0, 0]
        lost = f"; {state.n_lost} uses in the model were not seen" if state.n_lost else ""
        where = f"layer {_span(layers)}, expert {_span(experts)}"
        return f"{where}: {NAMES[Cell(int(value))]}; {hits} hits, {misses} misses{lost}"


def _span(numbers: list[int] | range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
