"""A prompt in pieces, one for each decode."""

from __future__ import annotations


def prompt_pieces(n_tokens: int, n_at_once: int, as_with: int = 0) -> list[int]:
    """Tokens of each call that computes a prompt. ``as_with``: a micro-batch whose results are wanted.

    llama.cpp computes a token that is left over alone by other kernels, whose sums round otherwise; of two or
    more at once each gets the same, however many they are.
    """
    alone = int(0 < as_with < n_tokens and n_tokens % as_with == 1)
    sizes = [min(n_at_once, n_tokens - alone - start) for start in range(0, n_tokens - alone, n_at_once)]
    return sizes + [1] * alone
