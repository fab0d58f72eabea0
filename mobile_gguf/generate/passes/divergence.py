"""How far two distributions over the next token are apart: pure arithmetic on rows of logits."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Real = TypeVar("Real", bound=np.floating)


def log_softmax(logits: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """Log probabilities of rows of logits, in their own precision."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(p: npt.NDArray[Real], q: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """KL(p || q) of rows of log probabilities, in nats: what coding p's tokens by q costs."""
    return (np.exp(p) * (p - q)).sum(-1)


def row_divergence(log_p: npt.NDArray[Any], log_q: npt.NDArray[Any]) -> float:
    """KL of one row of log probabilities, never below 0; infinite where they are no numbers."""
    there = log_p > -np.inf
    kl = float(divergence(log_p[there], log_q[there]))
    return max(0.0, kl) if kl == kl else math.inf


def spread_of(logits: npt.NDArray[Real]) -> float:
    """1 - the sum of squared probabilities of a row of logits: 0 where one token is certain."""
    e = np.exp(logits - logits.max())
    return max(0.0, 1.0 - float(e @ e) / float(e.sum()) ** 2)
