"""What makes up for the experts that a little token lacks: maps by channel, from sums over a text.

LDA's: the little output's mean and deviation become those that all experts give, on the same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.observe import LittleSums
from mobile_gguf.generate.passes.corrections import Corrections, make_corrections
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo

from .statistics import Floats

# (number of experts, mass that their weights are divided by; 0: their own)
Way = tuple[int, int]


@dataclass(frozen=True)
class Maps:
    """``scale`` and ``shift`` float32 [n_way, n_layer_moe, n_embd]; 1 and 0 of a layer that never ran."""

    ways: list[Way]
    scale: Floats
    shift: Floats

    @property
    def n_bytes(self) -> int:
        """What they take in the file."""
        return self.scale.nbytes + self.shift.nbytes

    def corrections(self, info: GgufInfo) -> Corrections:
        """As a policy takes them."""
        return make_corrections(info, self.ways, self.scale, self.shift)

    def tensors(self) -> dict[str, npt.NDArray[np.generic]]:
        return {keys.CORRECTION_SCALE: self.scale, keys.CORRECTION_SHIFT: self.shift}

    def metadata(self) -> dict[str, str]:
        return {keys.CORRECTION_WAYS: json.dumps(self.ways)}

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"ways": [{"little_k": k, "mass": mass} for k, mass in self.ways], "n_bytes": self.n_bytes}


def ways_of(top_k: int, little_ks: Sequence[int]) -> list[Way]:
    """For each number of experts: weights that take over all of the sum, and a part of it, the best there is.

    The mass half way to the top-k loses least without a map as well (docs/loss.md).
    """
    return [(k, mass) for k in sorted(set(little_ks)) if 0 < k < top_k for mass in (0, (k + top_k) // 2)]


def fit_maps(info: GgufInfo, ways: Sequence[Way], sums: Sequence[LittleSums]) -> Maps | None:
    """Maps of the sums of all layers; a mass that changes nothing is left out: a top-k may have no fixed sum.

    None where some layer's sum of experts cannot be corrected: it was not seen, or has other channels.
    """
    rows = [layer for layer in info.moe_layers if layer < info.n_layer]
    by_place = {(one.layer, one.way): one for one in sums}
    shape = (len(ways), len(info.moe_layers), info.n_embd)
    scale, shift = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    for way in range(len(ways)):
        for row, layer in enumerate(rows):
            one = by_place.get((layer, way))
            if one is None or len(one.big) != info.n_embd:
                return None
            scale[way, row], shift[way, row] = channel_moments(one)
    kept = [i for i, (_, mass) in enumerate(ways) if not mass or not _same(i, ways, scale, shift)]
    if not kept or not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return None
    return Maps([ways[i] for i in kept], scale[kept], shift[kept])


def channel_moments(one: LittleSums) -> tuple[Floats, Floats]:
    """Scale and shift by channel, so that the little output has mean and deviation of the big one."""
    mean_of_little, mean_of_big = one.little / one.n_tokens, one.big / one.n_tokens
    of_little = np.maximum(one.little2 / one.n_tokens - mean_of_little**2, 0)
    of_big = np.maximum(one.big2 / one.n_tokens - mean_of_big**2, 0)
    varies = of_little > 1e-12 * (one.little2 / one.n_tokens)  # more than rounding makes of a constant
    scale = np.where(varies, np.sqrt(of_big / np.where(varies, of_little, 1)), 1)
    shift = mean_of_big - scale * mean_of_little
    return scale.astype(np.float32), shift.astype(np.float32)


def _same(way: int, ways: Sequence[Way], scale: Floats, shift: Floats) -> bool:
    """Whether the map is that of the same experts with weights that are divided by their own mass."""
    own = list(ways).index((ways[way][0], 0))
    return bool((scale[way] == scale[own]).all() and (shift[way] == shift[own]).all())
