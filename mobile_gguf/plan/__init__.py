"""``mobile-gguf plan``: what of a model fits where, which settings to use, and how fast it will be.

``predict_cached`` and ``compare_run`` use measurements made before and never measure.
"""

from __future__ import annotations

from .known import compare_run, predict_cached
from .speed import Prediction

__all__ = ["Prediction", "compare_run", "predict_cached"]
