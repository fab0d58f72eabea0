"""The prompt of a gap between two texts, in the form of llama.cpp's ``format_prompt_infill``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FillTokens:
    """The tokens around the text before a gap, the text after it, and what fills it."""

    before: int
    after: int
    middle: int

    def prompt(
        self, start: Sequence[int], before: Sequence[int], after: Sequence[int], begun: Sequence[int]
    ) -> list[int]:
        """The prompt of a gap: ``start`` is what every text begins with, ``begun`` the gap's beginning."""
        return [*start, self.before, *before, self.after, *after, self.middle, *begun]
