"""The buddies in a calibrated file, as the engine takes them: BuddyMoE's lists, arXiv 2511.10054."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.loss import Buddies
from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.gguf.tensors import TensorError, read_tensor

# A list is the shortest prefix of this mass; the percentile of the entropy above which a layer substitutes.
ALPHA, PERCENTILE = 0.9, 15


def has_buddies(info: GgufInfo) -> bool:
    """Whether the file was calibrated."""
    return keys.STATISTICS_N_TOKENS in info.metadata


def read_buddies(info: GgufInfo, *, alpha: float = ALPHA, percentile: int = PERCENTILE) -> Buddies | None:
    """The buddies in a model's file, each list cut where its shares sum to ``alpha``; None if it has none.

    ``tau`` is the ``percentile`` of each layer's entropies, 1 (never) in a file that does not have them.
    Raises ModelFormatError if they are damaged.
    """
    if not has_buddies(info):
        return None
    experts = _array(info, f"{keys.BUDDIES}{keys.RANKED_EXPERT}", np.int32)
    shares = _array(info, f"{keys.BUDDIES}{keys.RANKED_SHARE}", np.float32)
    n_layer, n_expert = len(info.moe_layers), info.n_expert
    if experts is None or shares is None:
        raise _damaged(info, "they are missing")
    if experts.shape != shares.shape or experts.ndim != 3 or experts.shape[:2] != (n_layer, n_expert):
        raise _damaged(info, f"their shape is {experts.shape}")
    if experts.min() < -1 or experts.max() >= n_expert or not np.isfinite(shares).all() or shares.min() < 0:
        raise _damaged(info, "they name what cannot be")
    entropy = _array(info, keys.ENTROPY, np.float32)
    if entropy is not None and (
        entropy.ndim != 2 or len(entropy) != n_layer or not np.isfinite(entropy).all()
    ):
        raise _damaged(info, f"{keys.ENTROPY} has the shape {entropy.shape}")
    return make_buddies(info, experts, shares, entropy, alpha=alpha, percentile=percentile)


def make_buddies(
    info: GgufInfo,
    experts: npt.NDArray[np.int32],
    shares: npt.NDArray[np.float32],
    entropy: npt.NDArray[np.float32] | None,
    *,
    alpha: float = ALPHA,
    percentile: int = PERCENTILE,
) -> Buddies:
    """The buddies of ranked experts and their shares [n_layer_moe, n_expert, n], as ``read_buddies`` has it.

    ``entropy`` [n_layer_moe, n] are percentiles from 0 to 100.
    """
    before = np.cumsum(shares, axis=-1, dtype=np.float64) - shares
    experts = np.where(before < alpha - 1e-6, experts, -1)
    shape = (info.n_layer, *experts.shape[1:])
    found = Buddies(
        np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.ones(info.n_layer, np.float32)
    )
    rows = [layer for layer in info.moe_layers if layer < info.n_layer]
    found.experts[rows], found.shares[rows] = experts[: len(rows)], shares[: len(rows)]
    if entropy is not None and entropy.shape[-1]:
        at = np.linspace(0, 100, entropy.shape[1])
        found.tau[rows] = [np.interp(percentile, at, row) for row in entropy[: len(rows)]]
    return found


def _array(info: GgufInfo, name: str, dtype: type[np.generic]) -> npt.NDArray | None:
    try:
        return read_tensor(info, name, dtype)
    except TensorError as error:
        raise _damaged(info, str(error)) from None


def _damaged(info: GgufInfo, reason: str) -> ModelFormatError:
    return ModelFormatError(f"the buddies of {info.path} cannot be used: {reason}; calibrate it again")
