"""``mobile-gguf show``: what a model is, what of it fits where, and what calibration found out about it."""

from .verb import register

__all__ = ["register"]
