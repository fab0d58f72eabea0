"""Where every expert is, and what the last token asked for: the data of the expert map.

Residency is the engine's own and can be read at any time. What was hit and missed comes from the engine's
routing trace, which is written only while somebody watches: a file of ours, read after each token.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from mobile_gguf.api.model import Model, backend_of
from mobile_gguf.engine.binding import RESIDENT
from mobile_gguf.errors import MobileError

# A row is text, one character for each expert.
ABSENT, LOADING, HELD, HIT, MISSED = "0", "1", "2", "3", "4"
STATES = {"absent": ABSENT, "loading": LOADING, "resident": HELD, "hit": HIT, "missed": MISSED}

Asked = dict[tuple[int, int], str]


class ExpertMap:
    """Tells of a Model's experts; ``watched`` and ``after_token`` belong to the thread that decodes.

    A trace that fails ends: an answer must not fail because of its picture.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._shape = (model.info.n_layer, model.info.n_expert)
        self._layers = list(range(model.info.n_layer)) if model.info.is_moe else []
        self._watchers = 0
        self._lock = threading.Lock()
        self._trace: _Trace | None = None
        self._asked: Asked = {}
        self.n_tokens = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Somebody looks at the map meanwhile, so what tokens ask for is recorded."""
        with self._lock:
            self._watchers += 1
        try:
            yield
        finally:
            with self._lock:
                self._watchers -= 1

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """An answer is made meanwhile."""
        try:
            yield
        finally:
            self._end_trace()
            self._asked = {}

    def after_token(self) -> None:
        """Take in what the token just computed has asked for."""
        self.n_tokens += 1
        if not self._watchers:
            self._end_trace()
            return
        engine = getattr(backend_of(self._model), "engine", None)
        if engine is None:
            return
        try:
            if self._trace is None:
                self._trace = _Trace(engine, backend_of(self._model).ctx)
            asked = self._trace.take()
        except (MobileError, OSError):
            self._end_trace()
            return
        if asked:
            self._asked = asked

    def _end_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.close()

    def snapshot(self) -> dict[str, Any]:
        """The map now: by tier a row of characters for each layer; STATES says what they mean."""
        n_layer, n_expert = self._shape
        tiers: dict[str, list[str]] = {}
        resident: dict[str, int] = {}
        engine = getattr(backend_of(self._model), "engine", None)
        if engine is not None:
            llama, asked = backend_of(self._model), self._asked
            in_memory = engine.residency(llama.model, n_layer, n_expert)
            tiers["host"], resident["host"] = self._rows(in_memory, asked), self._count(in_memory)
            if getattr(llama, "device", None) is not None:
                from mobile_gguf.engine.device_calls import DeviceCalls

                with contextlib.suppress(MobileError):
                    on_device = DeviceCalls(engine, llama.ctx).residency(n_layer, n_expert)
                    tiers["device"], resident["device"] = self._rows(on_device, {}), self._count(on_device)
        return {
            "object": "experts",
            "n_layer": n_layer,
            "n_expert": n_expert,
            "layers": self._layers,
            "states": STATES,
            "tiers": tiers,
            "resident": resident,
            "n_tokens": self.n_tokens,
        }

    def _count(self, residency: list[bytes]) -> int:
        """What a token has hit or missed may be gone again, so rows do not tell."""
        return sum(1 for layer in self._layers for code in residency[layer] if code == RESIDENT)

    def _rows(self, residency: list[bytes], asked: Asked) -> list[str]:
        rows = []
        for layer in self._layers:
            # numpy arrays as well as bytes
            row = [
                ABSENT if code == 0 else HELD if code == RESIDENT else LOADING for code in residency[layer]
            ]
            for (at, expert), state in asked.items():
                if at == layer and expert < len(row):
                    row[expert] = state
            rows.append("".join(row))
        return rows


class _Trace:
    """The engine's routing trace, into a file of ours that is read as it grows."""

    def __init__(self, engine: Any, ctx: int) -> None:
        self._engine = engine
        self._ctx = ctx
        self._directory = tempfile.TemporaryDirectory(prefix="mobile-gguf-trace-")
        self._file: BufferedReader | None = None
        self._rest = b""
        self._columns: list[bytes] = []
        path = Path(self._directory.name) / "trace.csv"
        try:
            engine.trace_start(ctx, path)
            self._file = path.open("rb")
        except BaseException:
            self.close()
            raise

    def take(self) -> Asked:
        """What was asked for since the last call."""
        if self._file is None:
            return {}
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        if lines and not self._columns:
            self._columns = [name.strip() for name in lines.pop(0).split(b",")]
        asked: Asked = {}
        for line in lines:
            row = dict(zip(self._columns, line.split(b","), strict=False))
            with contextlib.suppress(ValueError, KeyError):
                moved = int(row[b"expert_bytes"]) > 0
                asked[int(row[b"layer"]), int(row[b"expert"])] = MISSED if moved else HIT
        return asked

    def close(self) -> None:
        """End the recording and remove the file."""
        with contextlib.suppress(MobileError):
            self._engine.trace_stop(self._ctx)
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(OSError):
            self._directory.cleanup()
