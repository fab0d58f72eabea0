"""The live expert map: where every expert is and what was just asked for, for everybody who watches a model.

Its rows are the model's layers that have routed experts, by number in ``Experts.layers``. Thread rule: any
thread may call anything here at any time, while another decodes or closes the model. Each call holds a lock
of this view for as long as a copy takes; ``close`` takes it too, so that nothing is read of a context that is
being freed, and afterwards there is nothing to see.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .binding import Engine
from .device_calls import DeviceCalls
from .forks import abandon_in_children
from .structs import ROUTED_MAX, ModelInfo, RoutedStruct

Codes = npt.NDArray[np.uint8]  # NOT_RESIDENT, LOADING or RESIDENT of each expert
ROUTED = np.dtype(RoutedStruct)
_FROM_NOW_ON = (1 << 64) - 1


class ExpertSource(Protocol):
    """The engine's calls behind a view; tests script another."""

    n_layer: int
    n_expert: int

    def host(self) -> list[bytes]: ...
    def device(self) -> list[bytes] | None: ...  # None without a device tier
    def watch(self, on: bool) -> None: ...
    def read(self, since: int, room: npt.NDArray[Any]) -> tuple[int, int, int]: ...  # how many, next, lost


class ContextExperts:
    """The calls on one context of a model with an expert store, by llama-cpp-python's addresses of both."""

    def __init__(self, engine: Engine, model: int, ctx: int, store: ModelInfo, has_device: bool) -> None:
        self._engine = engine
        self._model = model
        self._ctx = ctx
        self._device = DeviceCalls(engine, ctx) if has_device else None
        # the engine's numbers: a file may count layers for next-token prediction as well
        self.n_layer = store.n_layer
        self.n_expert = store.n_expert

    def host(self) -> list[bytes]:
        """Residency in host memory, a row for each layer of the model."""
        return self._engine.residency(self._model, self.n_layer, self.n_expert)

    def device(self) -> list[bytes] | None:
        """The same in slots of devices; None without any."""
        return self._device.residency(self.n_layer, self.n_expert) if self._device is not None else None

    def watch(self, on: bool) -> None:
        """Record what is routed in the engine's ring, or no longer."""
        self._engine.checked("routed_watch", "watching the experts", self._ctx, on)

    def read(self, since: int, room: npt.NDArray[Any]) -> tuple[int, int, int]:
        """Copy those from number ``since`` on into ``room``: how many, the next number, how many are lost."""
        following, lost = ctypes.c_uint64(), ctypes.c_uint64()
        n = self._engine.checked(
            "routed_read", "reading what was routed", self._ctx, since, room.ctypes.data, len(room),
            ctypes.byref(following), ctypes.byref(lost),
        )  # fmt: skip
        return n, following.value, lost.value


@dataclass(frozen=True)
class Places:
    """Where the experts are: codes [layers, experts] of host memory, and of devices' slots if there are."""

    host: Codes
    device: Codes | None = None


@dataclass(frozen=True)
class Asked:
    """Experts that tokens were routed to, in that order; arrays of one length.

    ``rows`` are those of the map. ``steps`` number the tokens that the context computed. ``missed`` ones had
    to be read; the others were in memory, in a device's slot, or on their way. ``n_lost`` more were not taken
    in time.
    """

    rows: npt.NDArray[np.int64]
    experts: npt.NDArray[np.int32]
    missed: npt.NDArray[np.bool_]
    steps: npt.NDArray[np.int32]
    n_lost: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, later: Asked) -> Asked:
        """Both, ``later`` behind."""
        return Asked(
            np.concatenate((self.rows, later.rows)),
            np.concatenate((self.experts, later.experts)),
            np.concatenate((self.missed, later.missed)),
            np.concatenate((self.steps, later.steps)),
            self.n_lost + later.n_lost,
        )

    def last(self) -> Asked:
        """What each layer asked for last: where the running token has not come yet, for the one before."""
        newest = np.full(self.rows.max(initial=-1) + 1, -1, dtype=self.steps.dtype)
        np.maximum.at(newest, self.rows, self.steps)
        of_last = self.steps == newest[self.rows]
        return Asked(
            self.rows[of_last], self.experts[of_last], self.missed[of_last], self.steps[of_last], self.n_lost
        )


class Experts:
    """The view of one Model's experts; without an expert store (``source`` None) there is nothing to see."""

    def __init__(self, source: ExpertSource | None, moe_layers: Sequence[int], n_expert: int = 0) -> None:
        """``moe_layers`` are the numbers of the layers with routed experts, as the file has them."""
        self._source = source
        self._lock = threading.Lock()
        self._n_watches = 0
        n_layer = source.n_layer if source is not None else len(moe_layers) and max(moe_layers) + 1
        self.n_expert = source.n_expert if source is not None else n_expert
        self.layers = tuple(layer for layer in moe_layers if layer < n_layer)
        self._row_of = np.full(n_layer, -1, dtype=np.int64)
        self._row_of[list(self.layers)] = np.arange(len(self.layers))
        abandon_in_children(self)

    @property
    def has_store(self) -> bool:
        """Whether there is anything to see."""
        return self._source is not None

    def places(self) -> Places | None:
        """Where every expert is now; None without an expert store, and once the model is closed."""
        with self._lock:
            if self._source is None:
                return None
            host, device = self._source.host(), self._source.device()
        return Places(self._codes(host), self._codes(device) if device is not None else None)

    def _codes(self, rows: list[bytes]) -> Codes:
        codes = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, self.n_expert)
        return codes[list(self.layers)]

    def watch(self) -> Watch:
        """Begin to record what tokens are routed to; end it with the Watch, which is a context manager.

        Several may be open: none takes from another. Raises EngineMemoryError.
        """
        room = np.zeros(ROUTED_MAX, dtype=ROUTED)
        with self._lock:
            return Watch(self, self._begin(), room)

    def close(self) -> None:
        """The model is about to be freed: from now on there is nothing to see."""
        with self._lock:
            self._source = None

    def _abandon(self) -> None:
        """In a forked child: nothing to see, and a lock that nobody holds."""
        self._lock = threading.Lock()
        self._source = None

    # for Watch

    def _begin(self) -> int:
        since = 0
        if self._source is not None:
            if self._n_watches == 0:
                self._source.watch(True)
            _, since, _ = self._source.read(_FROM_NOW_ON, np.zeros(0, dtype=ROUTED))
        self._n_watches += 1
        return since

    def _end(self) -> None:
        with self._lock:
            self._n_watches -= 1
            if self._n_watches == 0 and self._source is not None:
                self._source.watch(False)

    def _read(self, since: int, room: npt.NDArray[Any]) -> tuple[Asked, int]:
        with self._lock:
            n, following, lost = self._source.read(since, room) if self._source is not None else (0, since, 0)
        found = room[:n]
        found = found[(found["layer"] >= 0) & (found["layer"] < len(self._row_of))]
        rows = self._row_of[found["layer"]]
        found, rows = found[rows >= 0], rows[rows >= 0]
        return Asked(
            rows, found["expert"].copy(), found["missed"] != 0, found["step"].copy(), lost
        ), following


class Watch:
    """What is routed while this is open, for one reader."""

    def __init__(self, experts: Experts, since: int, room: npt.NDArray[Any]) -> None:
        self._experts = experts
        self._since = since
        self._room = room
        self._lock = threading.Lock()
        self._open = True
        abandon_in_children(self)

    def _abandon(self) -> None:
        """In a forked child: a lock that nobody holds."""
        self._lock = threading.Lock()

    def take(self) -> Asked:
        """What was routed since the last call."""
        with self._lock:
            asked, self._since = self._experts._read(self._since, self._room)
            return asked

    def close(self) -> None:
        """End it; the engine records on while another is open."""
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self._experts._end()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
