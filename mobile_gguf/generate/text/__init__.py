"""Bytes, text and a vocabulary: what is shown, what controls, how many tokens it has at least."""
