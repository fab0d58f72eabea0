"""Compute buffers of contexts, as the engine says them for a file (``mobile_measure_file``)."""

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
        """Of that very context.

        Nothing is said of those between: buffers grow by steps, and some are smaller for a longer context.
        """
        return self.known.get(context)


NOT_MEASURED = Measured()
