"""Finding NaN and infinite values fast: a sum first, and a look at each value only if that is not finite."""

from __future__ import annotations

from typing import Any


class NotFiniteError(ValueError):
    """Weights that hold NaN or infinite values, or that overflow the type they are converted to."""


def require_finite(values: Any, message: str) -> None:
    """Raise NotFiniteError(message) if a tensor or array of a float type holds a value that is not finite."""
    import numpy as np
    import torch

    if isinstance(values, np.ndarray):
        if values.dtype.kind != "f" or not values.size:
            return
        values = torch.from_numpy(np.ascontiguousarray(values))
    if not values.is_floating_point() or not values.numel():
        return
    if values.element_size() == 1:
        values = values.to(torch.float32)  # torch has no arithmetic for 8-bit floats
    # NaN and infinity survive a sum, and so does what overflows it: only then each value is looked at
    if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
        raise NotFiniteError(message)
