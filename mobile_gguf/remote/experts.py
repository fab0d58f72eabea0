"""The expert map of a server of ours, as ``/v1/experts`` tells it; of any other there is nothing to see."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from mobile_gguf.engine.experts import Asked, Codes, Places
from mobile_gguf.engine.structs import LOADING, NOT_RESIDENT, RESIDENT
from mobile_gguf.errors import MobileError

from .connection import Server

_CODES = {
    "absent": NOT_RESIDENT,
    "loading": LOADING,
    "resident": RESIDENT,
    "hit": RESIDENT,
    "missed": RESIDENT,
}


class RemoteExperts:
    """What ``Experts`` is for a model of this process; any thread may call it, and none waits for the net."""

    def __init__(self, server: Server, picture: dict[str, Any] | None) -> None:
        """``picture``: what the server said of its experts; None if it says nothing."""
        self._server = server
        self._lock = threading.Lock()
        self.layers: tuple[int, ...] = tuple(picture["layers"]) if picture else ()
        self.n_expert = int(picture["n_expert"]) if picture else 0
        self._places: Places | None = None
        self._asked: list[Asked] = []
        if picture:
            self.take(picture)

    @property
    def has_store(self) -> bool:
        """Whether there is anything to see."""
        return self._places is not None

    def places(self) -> Places | None:
        """Where every expert was when the server said it last."""
        return self._places

    def watch(self) -> RemoteWatch:
        """Begin to follow what the server's tokens ask for."""
        return RemoteWatch(self, self._server)

    def take(self, picture: dict[str, Any]) -> None:
        """Keep a picture: where experts are, and what was asked for."""
        tiers, states = picture.get("tiers") or {}, picture.get("states") or {}
        if "host" not in tiers:
            return
        rows = self._rows(tiers["host"])
        device = self._rows(tiers["device"]) if "device" in tiers else None
        places = Places(_codes(rows, states), _codes(device, states) if device is not None else None)
        missed, hit = rows == ord(states.get("missed", "?")), rows == ord(states.get("hit", "?"))
        at, experts = np.nonzero(missed | hit)
        steps = np.full(len(at), int(picture.get("n_tokens") or 0), dtype=np.int32)
        asked = Asked(at.astype(np.int64), experts.astype(np.int32), missed[at, experts], steps)
        with self._lock:
            self._places = places
            self._asked = [*self._asked[-64:], asked]

    def taken(self) -> Asked | None:
        """What was asked for since the last call; None if nothing was heard."""
        with self._lock:
            asked, self._asked = self._asked, []
        total = asked[0] if asked else None
        for one in asked[1:]:
            total = total + one if total is not None else one
        return total

    def close(self) -> None:
        """There is nothing to see any more."""
        self._places = None

    def _rows(self, rows: Sequence[str]) -> Codes:
        made = np.frombuffer("".join(rows).encode("ascii", "replace"), dtype=np.uint8)
        return made.reshape(len(self.layers), self.n_expert)


def _codes(rows: Codes, states: dict[str, str]) -> Codes:
    made = np.full(rows.shape, NOT_RESIDENT, dtype=np.uint8)
    for name, code in _CODES.items():
        made[rows == ord(states.get(name, "?"))] = code
    return made


class RemoteWatch:
    """Follows the server's map in a thread of its own while it is open; what fails there shows nothing."""

    def __init__(self, experts: RemoteExperts, server: Server) -> None:
        self._experts = experts
        self._server = server
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        if experts.has_store:
            self._thread = threading.Thread(target=self._follow, name="mobile-gguf-map", daemon=True)
            self._thread.start()

    def _follow(self) -> None:
        path = f"{self._server.root}/v1/experts?stream=true"
        with contextlib.suppress(MobileError, ValueError, KeyError, TypeError):
            for picture in self._server.events(path, None, self._ends.is_set):
                self._experts.take(picture)

    def take(self) -> Asked | None:
        """What was asked for since the last call."""
        return self._experts.taken()

    def close(self) -> None:
        """End it."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
