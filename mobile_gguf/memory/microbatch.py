"""How many tokens of a prompt are computed at once, where nobody says: pure functions of bytes and tokens.

Every pass of a long prompt over the layers reads nearly all experts that memory does not hold, so twice the
tokens at once halve what a token of the prompt waits for the disk. Buffers grow with them, and what they take
is missing for experts. While one pass reads it computes: once that hides the reads, more is no gain.

    reading a token = missing expert bytes / tokens at once
    hidden          = bytes of weights that a token is multiplied with / _MULTIPLIED_PER_READ

The figures are the same on every machine and do not hang on what was measured, so that a plan, a list and a
load decide alike. Free memory has a part in what is chosen, so results must not hang on it: ``prompt_pieces``
of ``generate/context/prompt_pieces.py`` sees to that, and nothing is chosen where it cannot.
"""

from __future__ import annotations

from mobile_gguf.gguf.info import GgufInfo

DEFAULT_UBATCH = 512  # llama.cpp's
LARGEST_UBATCH = 4096
# Bytes of weights that a processor multiplies a token of a prompt with while the disk reads one. Two cores
# and 1 GB/s: 40; sixteen and 5 GB/s: 64; eight and a disk of 500 MB/s: 300. Too much costs memory within the
# bound below, too little costs time without one.
_MULTIPLIED_PER_READ = 200
# What buffers may take of the experts' budget, for prompts: a tenth more misses at a quarter of the experts.
_PAYS_SHARE = 16


def larger_ubatches(info: GgufInfo, n_ctx: int, n_batch: int | None, flash_attn: bool) -> tuple[int, ...]:
    """What may be taken instead of the usual micro-batch, ascending, within a context and a batch.

    None with flash attention, whose kernels hang on the number of tokens, nor where layers remember or choose
    positions, of which it is not known.
    """
    caches = info.caches
    if flash_attn or caches.state_bytes or caches.sparse.kind or caches.compressed:
        return ()
    limit = min(LARGEST_UBATCH, n_ctx, n_batch or LARGEST_UBATCH)
    found, size = [], 2 * DEFAULT_UBATCH
    while size <= limit:
        found.append(size)
        size *= 2
    return tuple(found)


def reads_are_hidden(info: GgufInfo, ram_share: float, n_ubatch: int) -> bool:
    """Whether a pass of so many tokens computes for as long as it reads, ``ram_share`` being in memory."""
    missing = info.expert_bytes * max(0.0, 1 - ram_share)
    return missing * _MULTIPLIED_PER_READ <= _multiplied_bytes(info) * n_ubatch


def growth_pays(budget_bytes: int, left_bytes: int) -> bool:
    """Whether an experts' budget may shrink to ``left_bytes`` for the buffers of a larger micro-batch."""
    return budget_bytes - left_bytes <= budget_bytes // _PAYS_SHARE


def _multiplied_bytes(info: GgufInfo) -> float:
    """Weights that each token of a prompt is multiplied with: of the output matrix only the last one is."""
    dense = max(0, info.dense_bytes - info.embedding_bytes)
    return dense + info.expert_bytes * info.n_expert_used / max(1, info.n_expert)
