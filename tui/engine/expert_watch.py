"""Watching experts while a model generates: the engine's residency and its routing trace.

The trace names every expert that a token was routed to and whether it was in memory. It is written by the
engine into a file of ours, which is read after each token; that costs a fraction of a millisecond, where
observing the graph would cost a factor of three in speed.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.header import read_header

from .expert_state import Routed

if TYPE_CHECKING:
    from mobile_gguf.api.model import Model
    from mobile_gguf.gguf.info import GgufInfo

Residency = tuple[npt.NDArray[np.uint8], "npt.NDArray[np.uint8] | None"]


_EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)(?:_exps|\.\d+)\.")


def moe_layers(info: GgufInfo) -> list[int]:
    """Numbers of the layers that have routed experts, by the file's tensor names."""
    try:
        headers = [read_header(path) for path in info.files]
    except (MobileError, OSError):
        headers = []
    found = (_EXPERT_TENSOR.match(tensor.name) for header in headers for tensor in header.tensors)
    layers = sorted({int(match[1]) for match in found if match is not None})
    # Dense layers, where there are any, usually come first.
    return layers or list(range(info.n_layer - len(info.expert_layers), info.n_layer))


class Watch(Protocol):
    """What the engine thread asks of a watch; tests script another."""

    def start(self) -> None: ...
    def take(self) -> list[Routed]: ...
    def residency(self) -> Residency | None: ...
    def stop(self) -> None: ...


class ExpertWatch:
    """Watches one Model's experts; ``start``, ``take`` and ``stop`` belong to the thread that decodes.

    A watch that fails ends itself: an answer must not fail because of its picture.
    """

    def __init__(self, model: Model) -> None:
        from mobile_gguf.api.model import backend_of

        llama = backend_of(model)
        self._engine: Any = getattr(llama, "engine", None)
        self._llama = llama
        self._shape = (model.info.n_layer, model.info.n_expert)
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._file: BufferedReader | None = None
        self._rest = b""
        self._on_device: npt.NDArray[np.uint8] | None = None
        self._columns: dict[bytes, int] = {}

    def start(self) -> None:
        """Begin to record routing; nothing without an expert store."""
        if self._engine is None or self._file is not None:
            return
        try:
            self._directory = tempfile.TemporaryDirectory(prefix="mobile-gguf-trace-")
            path = Path(self._directory.name) / "trace.csv"
            self._engine.trace_start(self._llama.ctx, path)
            self._file = path.open("rb")
        except (MobileError, OSError):
            self.stop()

    def take(self) -> list[Routed]:
        """What was routed since the last call; the engine writes in blocks, so the last few may come late."""
        if self._file is None:
            return []
        self._look_at_devices()
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        if lines and not self._columns:
            self._columns = {name.strip(): i for i, name in enumerate(lines.pop(0).split(b","))}
        routed = []
        for line in lines:
            with contextlib.suppress(ValueError, IndexError, KeyError):
                routed.append(self._parse(line.split(b",")))
        return routed

    def _look_at_devices(self) -> None:
        # the device tier belongs to a context, and so to the thread that decodes
        if getattr(self._llama, "device", None) is not None:
            with contextlib.suppress(MobileError):
                rows = DeviceCalls(self._engine, self._llama.ctx).residency(*self._shape)
                self._on_device = self._array(rows)

    def _parse(self, fields: list[bytes]) -> Routed:
        column = self._columns
        # a row says how many bytes had to be moved for it
        hit = int(fields[column[b"expert_bytes"]]) == 0
        return Routed(int(fields[column[b"layer"]]), int(fields[column[b"expert"]]), hit)

    def residency(self) -> Residency | None:
        """Where the experts are now; safe in any thread while the model is open."""
        if self._engine is None:
            return None
        try:
            rows = self._engine.residency(self._llama.model, *self._shape)
        except MobileError:
            return None
        return self._array(rows), self._on_device

    def _array(self, rows: list[bytes]) -> npt.NDArray[np.uint8]:
        return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(self._shape).copy()

    def stop(self) -> None:
        """End the recording and drop its file."""
        if self._directory is None:
            return
        with contextlib.suppress(MobileError):
            self._engine.trace_stop(self._llama.ctx)
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(OSError):
            self._directory.cleanup()
        self._directory, self._file, self._rest, self._columns = None, None, b"", {}
