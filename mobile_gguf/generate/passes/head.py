"""The importance head: a linear probe that says, before a token is run, whether it deserves all experts.

p = sigmoid(weight . h + bias + token_bias[token]), where h is the last hidden state of the token before (what
the output matrix is multiplied with) and token the one about to be run. p estimates how likely a little pass
is to change the next token's distribution by more than ``kl``. Ours; written by ``mobile-gguf calibrate``,
stored as tensors ``mobile.head.*`` and metadata of the same prefix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.gguf.tensors import TensorError, read_tensor


@dataclass(frozen=True)
class Head:
    """A calibrated head; ``threshold`` is the probability above which a token is run big by default.

    ``weight`` [n_embd] and ``token_bias`` [n_vocab] are float32. ``little_k`` are the routed experts of a
    little pass that goes with ``threshold``; ``auc`` was measured on text that the head was not fitted on.
    """

    weight: npt.NDArray[np.float32]
    token_bias: npt.NDArray[np.float32]
    bias: float
    threshold: float
    little_k: int
    kl: float
    auc: float

    def probability(self, hidden: npt.NDArray[np.float32], token: int) -> float:
        """How likely ``token`` is important, after ``hidden`` [n_embd]; NaN if the state is not a number."""
        return sigmoid(float(hidden @ self.weight) + self.bias + float(self.token_bias[token]))


def sigmoid(score: float) -> float:
    """1 / (1 + exp(-score)), without overflow."""
    if score >= 0:
        return 1.0 / (1.0 + math.exp(-score))
    scaled = math.exp(score) if score == score else math.nan
    return scaled / (1.0 + scaled)


def has_head(info: GgufInfo) -> bool:
    """Whether the file says that it has one."""
    return keys.HEAD_THRESHOLD in info.metadata


def read_head(info: GgufInfo) -> Head | None:
    """The head in a model's file; None if it was not calibrated. Raises ModelFormatError if it is damaged."""
    if not has_head(info):
        return None
    facts = _Facts(info)
    return Head(
        weight=_vector(info, keys.HEAD_WEIGHT, info.n_embd),
        token_bias=_vector(info, keys.HEAD_TOKEN_BIAS, info.n_vocab),
        bias=facts.number(keys.HEAD_BIAS, -math.inf, math.inf),
        threshold=facts.number(keys.HEAD_THRESHOLD, 0, 1),
        little_k=int(facts.number(keys.HEAD_LITTLE_K, 1, max(1, info.n_expert_used))),
        kl=facts.number(keys.HEAD_KL, 0, math.inf),
        auc=facts.number(keys.HEAD_AUC, 0, 1),
    )


class _Facts:
    def __init__(self, info: GgufInfo) -> None:
        self.info = info

    def number(self, key: str, low: float, high: float) -> float:
        value: Any = self.info.metadata.get(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not low <= value <= high:
            raise _damaged(self.info.path, f"{key} is {value!r:.60}")
        return float(value)


def _vector(info: GgufInfo, name: str, length: int) -> npt.NDArray[np.float32]:
    try:
        vector = read_tensor(info, name, np.float32)
    except TensorError as error:
        raise _damaged(info.path, str(error)) from None
    if vector is None:
        raise _damaged(info.path, f"{name} is missing")
    if vector.shape != (length,):
        raise _damaged(info.path, f"{name} has the shape {vector.shape}, not {length} numbers")
    if not np.isfinite(vector).all():
        raise _damaged(info.path, f"{name} holds what is not a number")
    return vector


def _damaged(path: Path, reason: str) -> ModelFormatError:
    return ModelFormatError(f"the importance head of {path} cannot be used: {reason}; calibrate it again")
