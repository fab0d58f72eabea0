"""A scripted engine behind the live expert map: a test sets residency, and adds what is routed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mobile_gguf.engine.experts import ROUTED, Asked

Entry = tuple[int, int, int, bool]  # step, layer, expert, missed


class ScriptedSource:
    """Residency codes [n_layer, n_expert], all absent; a ring of ``size`` entries."""

    def __init__(self, n_layer: int, n_expert: int, size: int = 64) -> None:
        self.n_layer = n_layer
        self.n_expert = n_expert
        self.size = size
        self.host_codes = np.zeros((n_layer, n_expert), dtype=np.uint8)
        self.device_codes: np.ndarray | None = None
        self.switched: list[bool] = []
        self.entries: list[Entry] = []
        self.before_read: Callable[[], None] = lambda: None

    @property
    def watched(self) -> bool:
        return bool(self.switched) and self.switched[-1]

    def add(self, *entries: Entry) -> None:
        """Route, which is recorded while watched."""
        if self.watched:
            self.entries += entries

    def host(self) -> list[bytes]:
        return [row.tobytes() for row in self.host_codes]

    def device(self) -> list[bytes] | None:
        return None if self.device_codes is None else [row.tobytes() for row in self.device_codes]

    def watch(self, on: bool) -> None:
        self.switched.append(on)

    def read(self, since: int, room: Any) -> tuple[int, int, int]:
        self.before_read()
        end = len(self.entries)
        oldest = max(0, end - self.size)
        first = min(max(since, oldest), end)
        found = self.entries[first : first + len(room)]
        room[: len(found)] = np.array(found, dtype=ROUTED)
        return len(found), first + len(found), max(0, oldest - since)


def asked(*uses: tuple[int, int, bool], n_lost: int = 0) -> Asked:
    """Uses as (row, expert, missed), of one token."""
    rows, experts, missed = np.array(uses, dtype=np.int64).reshape(-1, 3).T
    return Asked(rows, experts.astype(np.int32), missed != 0, np.zeros(len(uses), np.int32), n_lost)
