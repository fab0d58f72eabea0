"""How many texts a context holds at once, and what they take beside one: arithmetic of the header."""

from __future__ import annotations

from dataclasses import dataclass

from mobile_gguf.gguf.caches import F16_KV, KvTypes, padded_context
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import AUTO_PARALLEL

# What ``auto`` may grow to.
AUTO_MOST = 8
_F32 = 4


@dataclass(frozen=True)
class Sequences:
    """``n`` texts at once that share the cells of a context; ``is_apart``: each has as many of its own."""

    n: int = 1
    is_apart: bool = False

    def __str__(self) -> str:
        """What is to be said beside the tokens of a context."""
        if self.n == 1:
            return ""
        return f" for each of {self.n} answers" if self.is_apart else f" for {self.n} answers at once"

    def kept_bytes(self, info: GgufInfo, n_ctx: int, flash_attn: bool, kv: KvTypes = F16_KV) -> int:
        """Keys, values and states of all of them; ``n_ctx`` tokens, of each if they are apart."""
        caches = info.caches
        rows = caches.n_bytes(padded_context(n_ctx), flash_attn, kv) - caches.state_bytes
        return rows * (self.n if self.is_apart else 1) + caches.state_bytes * self.n

    def logits_bytes(self, info: GgufInfo) -> int:
        """Logits of a decode: each has a row where they are computed, and one where they are read."""
        return 2 * (self.n - 1) * info.n_vocab * _F32


ONE = Sequences()


def sequences_of(info: GgufInfo, options: LoadOptions) -> tuple[Sequences, str]:
    """What ``options`` ask for, and why it cannot be, if so: then it is one."""
    asked = AUTO_MOST if options.parallel == AUTO_PARALLEL else int(options.parallel or 1)
    if asked == 1:
        return ONE, ""
    caches = info.caches
    if caches.sparse.kind or caches.compressed or not (caches.n_bytes(1, False)):
        return (
            ONE,
            f"answers of a {info.architecture} model are made one after another: --parallel has no effect",
        )
    return Sequences(asked, options.deterministic), ""
