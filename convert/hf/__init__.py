"""Hugging Face checkpoints: where they come from, whether they are sound, and how they are read."""
