"""Running tokens through a backend without sampling any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mobile_gguf.generate.context.pace import run_token


def run(backend: Any, tokens: Sequence[int]) -> None:
    """Run tokens at the next places: several, or the first, big; a single one as the policy says."""
    if len(tokens) != 1 or not backend.sequence.tokens:
        backend.sequence.run_prompt(tokens)
    else:
        run_token(backend, backend.sequence, tokens[0])
