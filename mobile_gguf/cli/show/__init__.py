"""``mobile-gguf show``: what a model is, what fits, what calibration found."""
