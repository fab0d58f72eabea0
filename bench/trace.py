"""Routing traces: which experts each layer of a real model chose for each token.

A trace file is CSV (gzip or plain) with the columns
``turn,phase,step,layer,slot,expert,weight,residency,expert_bytes``: ``phase`` 0 is the prompt, 1 is
decoding, ``slot`` the rank in the token's top-k, ``weight`` the router weight. Lines with ``#`` give
the model's geometry. ``mobile_trace_start`` of the engine writes the same columns.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import MobileError

_COLUMNS = ("phase", "step", "layer", "slot", "expert", "weight")


class TraceError(MobileError):
    """A trace that is missing, damaged, or says something impossible."""


@dataclass(frozen=True)
class Trace:
    """Routed experts by step, layer and rank.

    ``experts`` [n_steps, n_layer, k] holds expert ids, best first; -1 where nothing was routed (a layer
    computed for the prompt's last token only). ``weights`` [n_steps, n_layer, k] sum to 1 over k.
    The first ``n_prompt`` steps are the prompt.
    """

    name: str
    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    n_expert: int
    n_prompt: int
    source: str

    @property
    def n_steps(self) -> int:
        return self.experts.shape[0]

    @property
    def n_layer(self) -> int:
        return self.experts.shape[1]

    @property
    def k(self) -> int:
        return self.experts.shape[2]

    @property
    def n_decode(self) -> int:
        return self.n_steps - self.n_prompt

    def digest(self) -> str:
        """Twelve hex digits that change with anything a model built from the trace depends on."""
        hasher = hashlib.sha256(f"{self.n_expert} {self.experts.shape}".encode())
        hasher.update(np.ascontiguousarray(self.experts).tobytes())
        hasher.update(np.ascontiguousarray(self.weights).tobytes())
        return hasher.hexdigest()[:12]

    def first(self, n_steps: int) -> Trace:
        """The same trace, cut after ``n_steps``."""
        if n_steps >= self.n_steps:
            return self
        return Trace(
            self.name, self.experts[:n_steps], self.weights[:n_steps], self.n_expert,
            min(self.n_prompt, n_steps), self.source,
        )  # fmt: skip


def read_trace(path: Path) -> Trace:
    """Read a trace file; raises TraceError naming the file and, where it can, the line."""
    geometry: dict[str, str] = {}
    rows: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    try:
        with _open_text(path) as stream:
            body = _skip_comments(stream, geometry)
            reader = csv.DictReader(body)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise TraceError(f"{path} is not a routing trace: it has no column {', '.join(missing)}")
            for number, row in enumerate(reader, start=1):
                try:
                    for name in _COLUMNS:
                        rows[name].append(float(row[name]) if name == "weight" else int(row[name]))
                except (TypeError, ValueError):
                    raise TraceError(f"{path}: row {number} is damaged: {dict(row)}") from None
    except FileNotFoundError:
        raise TraceError(f"no trace at {path}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from None
    if not rows["step"]:
        raise TraceError(f"{path} holds no routed experts")
    return _assemble(path, geometry, {name: np.asarray(values) for name, values in rows.items()})


def _open_text(path: Path) -> Any:
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if compressed else path.open(encoding="utf-8")


def _skip_comments(stream: Any, geometry: dict[str, str]) -> Any:
    for line in stream:
        if not line.startswith("#"):
            yield line
            continue
        for word in line[1:].split():
            key, equals, value = word.partition("=")
            if equals:
                geometry.setdefault(key, value)


def _assemble(path: Path, geometry: dict[str, str], rows: dict[str, npt.NDArray[Any]]) -> Trace:
    step, layer, slot = rows["step"] - rows["step"].min(), rows["layer"], rows["slot"]
    for name in ("layer", "slot", "expert"):
        if rows[name].min() < 0:
            raise TraceError(f"{path}: a negative {name}")
    n_steps, n_layer, k = int(step.max()) + 1, int(layer.max()) + 1, int(slot.max()) + 1
    n_layer = _declared(path, geometry, "n_layer", n_layer)
    n_expert = _declared(path, geometry, "n_expert", int(rows["expert"].max()) + 1)
    k = _declared(path, geometry, "n_expert_used", k)
    experts = np.full((n_steps, n_layer, k), -1, dtype=np.int32)
    weights = np.zeros((n_steps, n_layer, k), dtype=np.float32)
    experts[step, layer, slot] = rows["expert"]
    weights[step, layer, slot] = rows["weight"]
    routed = (experts >= 0).sum(axis=2)
    if not np.isin(routed, (0, k)).all() or len(step) != int(routed.sum()):
        at_step, at_layer = np.argwhere((routed != 0) & (routed != k))[0] if (routed % k).any() else (0, 0)
        raise TraceError(f"{path}: step {at_step}, layer {at_layer} does not have its {k} experts just once")
    ordered = np.sort(experts, axis=2)
    if ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any():
        raise TraceError(f"{path}: a token is routed twice to one expert of a layer")
    decoding = np.zeros(n_steps, dtype=bool)
    decoding[step[rows["phase"] != 0]] = True
    n_prompt = int(np.argmax(decoding)) if decoding.any() else n_steps
    if not decoding[n_prompt:].all():
        raise TraceError(f"{path}: prompt steps after the first decoded one (several turns in one file?)")
    return Trace(path.name.split(".")[0], experts, weights, n_expert, n_prompt, str(path))


def _declared(path: Path, geometry: dict[str, str], key: str, found: int) -> int:
    """The header's number, which the rows may not exceed; without a header, the rows' own."""
    text = geometry.get(key)
    if text is None:
        return found
    if not text.isdigit() or int(text) < found:
        raise TraceError(f"{path}: its header says {key}={text}, its rows go up to {found}")
    return int(text)
