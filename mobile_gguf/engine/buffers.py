"""Compute buffers of contexts, as the engine says them for a file (``mobile_measure_file``), and between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Context(NamedTuple):
    """What a compute buffer's size hangs on: tokens of the context, of a micro-batch, and flash attention."""

    n_ctx: int
    n_ubatch: int
    flash_attn: bool

    def __str__(self) -> str:
        return f"{self.n_ctx} {self.n_ubatch} {int(self.flash_attn)}"

    @classmethod
    def parse(cls, text: str) -> Context:
        """The inverse of ``str``. Raises ValueError."""
        n_ctx, n_ubatch, flash_attn = map(int, text.split())
        return cls(n_ctx, n_ubatch, bool(flash_attn))


class Buffers(NamedTuple):
    """Bytes of a context's compute buffers: as llama.cpp reserves and logs them, with logits of every token
    of a micro-batch; and what of it is written to where only the last token's are asked for."""

    reserved: int
    used: int


@dataclass(frozen=True)
class Measured:
    """What was measured of one file."""

    known: Mapping[Context, Buffers] = field(default_factory=dict)

    def at(self, context: Context) -> Buffers | None:
        """As it was measured, or between two contexts that differ in nothing but their length.

        A buffer is as large as the largest moment of its graph, and each moment grows evenly with the
        context: the line between two lengths is never below it.
        """
        if context in self.known:
            return self.known[context]
        lengths = sorted(one.n_ctx for one in self.known if one[1:] == context[1:])
        below = [n for n in lengths if n < context.n_ctx]
        above = [n for n in lengths if n > context.n_ctx]
        if not below or not above:
            return None
        low, high = below[-1], above[0]
        first, last = (self.known[context._replace(n_ctx=n)] for n in (low, high))
        share = (context.n_ctx - low) / (high - low)
        return Buffers(*(int(a + share * (b - a)) + 1 for a, b in zip(first, last, strict=True)))


NOT_MEASURED = Measured()
