"""Corrections of little tokens: Python's side of ``mobile_set_correction`` in ``patches/src/mobile.h``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .binding import Engine

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Correction:
    """An affine map of what each layer's routed experts sum to, for tokens with ``k`` of them.

    ``mass``: of how many experts' mass the kept weights are divided by, 0: by their own, where it was found.
    ``scale`` and ``shift`` float32 [n_layer, n_embd] by the model's layers: 1 and 0 where there is no map.
    """

    k: int
    mass: int
    scale: npt.NDArray[np.float32] = field(compare=False, repr=False)
    shift: npt.NDArray[np.float32] = field(compare=False, repr=False)
    digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.scale.tobytes() + self.shift.tobytes()).hexdigest()
        object.__setattr__(self, "digest", digest)


def set_correction(engine: Engine, ctx: int, correction: Correction | None) -> None:
    """Have it ready on ``ctx``, None: none; it is off until ``set_corrected``.

    Raises UsageError if it does not fit the model, EngineError where a layer's experts are computed twice.
    """
    import numpy as np

    if correction is None:
        engine.checked("set_correction", "ending the correction", ctx, 0, None, None, 0, 0)
        return
    scale, shift = (np.ascontiguousarray(a, np.float32) for a in (correction.scale, correction.shift))
    engine.checked(
        "set_correction", "setting the correction of little tokens", ctx,
        correction.k, scale.ctypes.data, shift.ctypes.data, *scale.shape,
    )  # fmt: skip


def set_corrected(engine: Engine, ctx: int, on: bool) -> None:
    """Whether tokens with its number of experts are corrected from the next decode on."""
    engine.checked("set_corrected", "choosing whether little tokens are corrected", ctx, on)
