"""A gauge: a name, the latest value, and a sparkline of what came before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from textual.content import Content
from textual.widget import Widget

BARS = "▁▂▃▄▅▆▇█"
_KEPT = 200


def sparkline(values: Iterable[float], width: int) -> str:
    """The last ``width`` values as bars, the largest of them the highest; zero and nothing are the lowest."""
    shown = list(values)[-width:] if width > 0 else []
    top = max(shown, default=0.0)
    if top <= 0:
        return BARS[0] * len(shown)
    last = len(BARS) - 1
    return "".join(BARS[min(last, max(0, round(value / top * last)))] for value in shown)


class Gauge(Widget):
    """Two lines: the name and the latest value, and the sparkline."""

    def __init__(self, label: str, show: Callable[[float], str], *, id: str) -> None:
        super().__init__(id=id)
        self._label = label
        self._show = show
        self.values: deque[float] = deque(maxlen=_KEPT)
        self.latest: float | None = None  # what is said in place of the last value

    def add(self, values: Iterable[float]) -> None:
        """Append values and draw them."""
        self.values.extend(values)
        self.refresh()

    def clear(self) -> None:
        """Forget all values."""
        self.values.clear()
        self.latest = None
        self.refresh()

    def render(self) -> Content:
        """The two lines."""
        said = self.latest if self.latest is not None else self.values[-1] if self.values else None
        latest = self._show(said) if said is not None else "-"
        room = max(1, self.size.width)
        first = f"{self._label} {latest:>{max(0, room - len(self._label) - 1)}}"
        bars = sparkline(self.values, room)
        return Content.assemble(first[:room], "\n", (bars, "$accent"))
