"""The corrections of little tokens in a calibrated file: affine maps of what a layer's experts sum to.

After LDA: each channel's mean and deviation over a text become those that all experts have. Maps are found
for a number of experts and for what their weights are divided by, and fit no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mobile_gguf.engine.correction import Correction
from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.gguf.tensors import TensorError, read_tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# By number of experts and mass.
Corrections = Mapping[tuple[int, int], Correction]


def has_corrections(info: GgufInfo) -> bool:
    """Whether the file says that it has some."""
    return keys.CORRECTION_WAYS in info.metadata


def read_corrections(info: GgufInfo) -> Corrections:
    """Those in a model's file; empty if it has none. Raises ModelFormatError for damaged ones."""
    if not has_corrections(info):
        return {}
    ways = _ways(info)
    shape = (len(ways), len(info.moe_layers), info.n_embd)
    scale, shift = (_array(info, name, shape) for name in (keys.CORRECTION_SCALE, keys.CORRECTION_SHIFT))
    return make_corrections(info, ways, scale, shift)


def make_corrections(
    info: GgufInfo,
    ways: list[tuple[int, int]],
    scale: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float32],
) -> Corrections:
    """Of maps [n_way, n_layer_moe, n_embd], by ways: a number of experts and a mass each."""
    import numpy as np

    found: dict[tuple[int, int], Correction] = {}
    rows = [layer for layer in info.moe_layers if layer < info.n_layer]
    for (k, mass), scales, shifts in zip(ways, scale, shift, strict=True):
        scale_of = np.ones((info.n_layer, info.n_embd), np.float32)
        shift_of = np.zeros_like(scale_of)
        scale_of[rows], shift_of[rows] = scales[: len(rows)], shifts[: len(rows)]
        found[k, mass] = Correction(k, mass, scale_of, shift_of)
    return found


def best_correction(info: GgufInfo, corrections: Corrections, k: int) -> Correction:
    """The one for tokens with ``k`` experts, of the largest mass that there is. Raises UsageError."""
    masses = [mass for of_k, mass in corrections if of_k == k]
    return correction_of(info, corrections, k, max(masses, default=0))


def correction_of(info: GgufInfo, corrections: Corrections, k: int, mass: int) -> Correction:
    """The one for tokens with ``k`` experts whose weights are divided by this mass. Raises UsageError."""
    name = info.path.name
    if not corrections:
        raise UsageError(
            f"{name} has no corrections of little tokens: run `mobile-gguf calibrate {info.path}`"
        )
    if (k, mass) not in corrections:
        there = ", ".join(
            f"{of_k} experts" + (f" and mass {of_mass}" if of_mass else "") for of_k, of_mass in corrections
        )
        asked = f"{k} experts" + (f" and mass {mass}" if mass else "")
        raise UsageError(f"{name} has corrections for tokens with {there}, none for {asked}")
    return corrections[k, mass]


def _ways(info: GgufInfo) -> list[tuple[int, int]]:
    text: Any = info.metadata[keys.CORRECTION_WAYS]
    try:
        ways = [(k, mass) for k, mass in json.loads(text)]
    except (TypeError, ValueError):
        ways = []
    top_k = info.n_expert_used
    good = all(type(n) is int for way in ways for n in way)
    if not ways or not good or not all(0 < k < top_k and 0 <= mass <= top_k for k, mass in ways):
        raise _damaged(info, f"metadata {keys.CORRECTION_WAYS} is {text!r:.60}")
    return ways


def _array(info: GgufInfo, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    import numpy as np

    try:
        values = read_tensor(info, name, np.float32)
    except TensorError as error:
        raise _damaged(info, str(error)) from None
    if values is None:
        raise _damaged(info, f"tensor {name} is missing")
    if values.shape != shape:
        raise _damaged(info, f"tensor {name} has the shape {values.shape}, not {shape}")
    if not np.isfinite(values).all():
        raise _damaged(info, f"tensor {name} holds what is not a number")
    return values


def _damaged(info: GgufInfo, reason: str) -> ModelFormatError:
    return ModelFormatError(f"the corrections of {info.path} cannot be used: {reason}; calibrate it again")
