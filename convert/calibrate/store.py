"""Statistics in a GGUF: which tensors and keys hold them (docs/format-calibration.md), made and read.

A file is untrusted: what is read back is checked against the model's geometry, value by value.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info

from ..gguf.file import GgufSource
from .buddies import NO_EXPERT, Ranked
from .statistics import MAX_NEXT, N_PERCENTILES, Floats, Statistics

# All that one calibration replaces of another.
PREFIXES = (
    keys.STATISTICS, keys.HOTNESS, keys.ROUTER_WEIGHT, keys.ENTROPY,
    keys.BUDDIES, keys.TRANSITIONS, keys.IMPORTANCE
)  # fmt: skip

# Room for rounding in sums and shares that should be at most 1 (or top-k).
_SLACK = 1e-4


def statistics_tensors(statistics: Statistics) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors that hold ``statistics``, by name; numpy's order of dimensions."""
    tensors: dict[str, npt.NDArray[np.generic]] = {
        keys.HOTNESS: statistics.hotness,
        keys.ROUTER_WEIGHT: statistics.weight,
    }
    if statistics.entropy.size:
        tensors[keys.ENTROPY] = statistics.entropy
    for name, ranked in ((keys.BUDDIES, statistics.buddies), (keys.TRANSITIONS, statistics.transitions)):
        if ranked.expert.size:
            tensors[f"{name}{keys.RANKED_EXPERT}"] = ranked.expert
            tensors[f"{name}{keys.RANKED_SHARE}"] = ranked.share
    for layer, values in statistics.importance.items():
        tensors[f"{keys.IMPORTANCE}{layer}"] = values
    return tensors


def statistics_metadata(statistics: Statistics) -> dict[str, int]:
    """The metadata that goes with them."""
    return {keys.STATISTICS_N_TOKENS: statistics.n_tokens}


def read_statistics(path: Path, *, importance: bool = True) -> Statistics | None:
    """The statistics in a GGUF; None if it has none.

    ``importance`` False leaves the neurons' out, which is most of the bytes; ``inputs`` are never stored.
    Raises ModelFormatError if they do not fit the model.
    """
    info = read_gguf_info(path)
    with GgufSource.open(path) as source:
        if source.tensor(keys.HOTNESS) is None:
            return None
        return _Reader(info, source).read(importance)


class _Reader:
    def __init__(self, info: GgufInfo, source: GgufSource) -> None:
        self.info = info
        self.source = source
        self.layers = info.moe_layers

    def read(self, importance: bool) -> Statistics:
        n_layer, n_expert = len(self.layers), self.info.n_expert
        n_tokens = self.source.metadata.get(keys.STATISTICS_N_TOKENS)
        if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 1:
            self.fail(f"metadata {keys.STATISTICS_N_TOKENS} is {n_tokens!r:.60}")
        return Statistics(
            n_tokens=n_tokens,
            n_expert=n_expert,
            n_expert_used=self.info.n_expert_used,
            layers=self.layers,
            hotness=self.floats(keys.HOTNESS, (n_layer, n_expert), high=1 + _SLACK),
            weight=self.floats(keys.ROUTER_WEIGHT, (n_layer, n_expert)),
            buddies=self.ranked(keys.BUDDIES, n_layer),
            transitions=self.ranked(keys.TRANSITIONS, n_layer - 1),
            entropy=self.entropy(n_layer),
            importance=self.importance() if importance else {},
        )

    def fail(self, reason: str) -> NoReturn:
        raise ModelFormatError(
            f"{self.source.path}: its statistics cannot be used: {reason}; calibrate it again"
        )

    def floats(self, name: str, shape: tuple[int, ...], *, low: float = 0.0, high: float = np.inf) -> Floats:
        values = self.array(name, np.dtype(np.float32), shape)
        if not np.isfinite(values).all() or values.min() < low or values.max() > high:
            self.fail(f"tensor {name} holds values that cannot be")
        return values

    def entropy(self, n_layer: int) -> Floats:
        if self.source.tensor(keys.ENTROPY) is None:
            return np.zeros((n_layer, 0), np.float32)
        found = self.floats(keys.ENTROPY, (n_layer, N_PERCENTILES), high=1.0)
        if (np.diff(found, axis=-1) < 0).any():
            self.fail(f"tensor {keys.ENTROPY} does not ascend")
        return found

    def ranked(self, name: str, n_layer: int) -> Ranked:
        n_expert = self.info.n_expert
        if n_layer < 1:
            shape = (0, n_expert, min(n_expert, MAX_NEXT))
            return Ranked(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        tensor = self.source.tensor(f"{name}{keys.RANKED_EXPERT}")
        n_rank = tensor.shape[0] if tensor is not None else 0
        if not 1 <= n_rank <= n_expert:
            self.fail(f"tensor {name}{keys.RANKED_EXPERT} is missing or has the wrong shape")
        shape = (n_layer, n_expert, n_rank)
        expert = self.array(f"{name}{keys.RANKED_EXPERT}", np.dtype(np.int32), shape)
        share = self.floats(f"{name}{keys.RANKED_SHARE}", shape, high=1 + _SLACK)
        if expert.min() < NO_EXPERT or expert.max() >= n_expert:
            self.fail(f"tensor {name}{keys.RANKED_EXPERT} names an expert that is not there")
        if (np.diff(share, axis=-1) > 0).any():
            self.fail(f"tensor {name}{keys.RANKED_SHARE} does not descend")
        return Ranked(expert, share)

    def importance(self) -> dict[int, Floats]:
        found = {}
        for layer in self.layers:
            tensor = self.source.tensor(f"{keys.IMPORTANCE}{layer}")
            if tensor is not None:
                found[layer] = self.floats(tensor.name, (self.info.n_expert, tensor.shape[0]))
        return found

    def array(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> npt.NDArray:
        tensor = self.source.tensor(name)
        kind = {np.dtype(np.float32): 0, np.dtype(np.int32): 26}[dtype]
        if tensor is None or tensor.type_id != kind or tensor.shape != tuple(reversed(shape)):
            self.fail(f"tensor {name} is missing or has the wrong type or shape")
        return self.source.array(name).astype(dtype, copy=False)
