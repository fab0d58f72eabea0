"""What a model takes of memory beside its experts, on the host and on devices: pure arithmetic of its header.

Estimates err on the high side: a budget that is too large gets the process killed, one that is too small
costs reads or misses.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobile_gguf.gguf.caches import CONTEXT_MULTIPLE, DSV4, QSA, padded_context
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import format_bytes

DEFAULT_CONTEXT = 4096
_F16, _F32 = 2, 4
# The engine's vocabulary: token texts, two hash maps and the merges, measured at 300-400 bytes a token.
_VOCABULARY_BYTES = 400


@dataclass(frozen=True)
class Demand:
    """Weights that are no routed experts, what a context keeps (KV) and compute buffers, in bytes."""

    dense_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.compute_bytes

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.dense_bytes + other.dense_bytes,
            self.kv_bytes + other.kv_bytes,
            self.compute_bytes + other.compute_bytes,
        )

    def __str__(self) -> str:
        return (
            f"dense weights {format_bytes(self.dense_bytes)}, KV {format_bytes(self.kv_bytes)}, "
            f"buffers {format_bytes(self.compute_bytes)}"
        )


def context_size(info: GgufInfo, asked: int | None) -> int:
    """Tokens of context: as asked, 0 for the model's own, by default that but at most 4096."""
    trained = info.n_ctx_train or DEFAULT_CONTEXT
    if asked is None:
        return min(DEFAULT_CONTEXT, trained)
    return asked or trained


def estimate_demand(info: GgufInfo, *, n_ctx: int, n_ubatch: int, flash_attn: bool = False) -> Demand:
    """The demand with all layers on the host, for a context of ``n_ctx`` tokens."""
    n_ctx, n_ubatch = _padded(n_ctx, n_ubatch)
    return Demand(
        _dense_bytes(info),
        kv_cache_bytes(info, n_ctx, flash_attn),
        compute_buffer_bytes(info, n_ctx, n_ubatch, flash_attn),
    )


def estimate_device_demand(info: GgufInfo, *, n_ctx: int, n_ubatch: int, flash_attn: bool = False) -> Demand:
    """The demand on devices that have all layers; unlike on the host, logits of a whole batch have real
    memory there."""
    n_ctx, n_ubatch = _padded(n_ctx, n_ubatch)
    logits = n_ubatch * info.n_vocab * _F32
    activations = _activation_bytes(info, n_ctx, n_ubatch, flash_attn)
    return Demand(_dense_bytes(info), kv_cache_bytes(info, n_ctx, flash_attn), activations + logits)


def host_share(demand: Demand, info: GgufInfo) -> Demand:
    """What stays in host memory when all layers are on devices: the token embedding, and buffers."""
    return Demand(
        dense_bytes=min(info.embedding_bytes, demand.dense_bytes),
        kv_bytes=0,
        compute_bytes=demand.compute_bytes,
    )


def kv_cache_bytes(info: GgufInfo, n_ctx: int, flash_attn: bool = False) -> int:
    """Keys, values, indexers' keys and states of a context, as ``mobile_gguf/gguf/caches.py`` counts them."""
    return info.caches.n_bytes(n_ctx, flash_attn)


def compute_buffer_bytes(info: GgufInfo, n_ctx: int, n_ubatch: int, flash_attn: bool) -> int:
    """Activations of one micro-batch of ``n_ubatch`` tokens, one token's logits and the vocabulary.

    The engine reserves room for logits of every token of the batch, but what is never written is never
    resident on the host.
    """
    logits = 2 * info.n_vocab * _F32
    return _activation_bytes(info, n_ctx, n_ubatch, flash_attn) + logits + info.n_vocab * _VOCABULARY_BYTES


def _activation_bytes(info: GgufInfo, n_ctx: int, n_ubatch: int, flash_attn: bool) -> int:
    """Without flash attention the scores [heads, n_ctx, n_ubatch] dominate."""
    caches = info.caches
    masks = (2 if caches.windows else 1) * (_F16 if flash_attn else _F32)
    scores = 0 if flash_attn else max(info.n_head, default=0) * _F32
    transposed = 0 if flash_attn else n_ctx * caches.latent * _F16
    routed = max(1, info.n_expert_used)
    outputs = (info.segments + 1) * info.n_embd  # of each expert: of its segments, and their sum
    activations = n_ubatch * (8 * info.n_embd + routed * (3 * info.n_ff_expert + outputs)) * _F32
    attention = n_ctx * n_ubatch * (scores + masks)
    return attention + transposed + activations + _sparse_bytes(info, n_ctx, n_ubatch, flash_attn)


def _sparse_bytes(info: GgufInfo, n_ctx: int, n_ubatch: int, flash_attn: bool) -> int:
    """What choosing positions takes: indexers' scores, the order of the chosen, and masks made of it.

    Bytes per position and token as the pinned llama.cpp allocates them, by its graphs' largest moment.
    """
    sparse = info.caches.sparse
    if not sparse.kind:
        return 0
    chosen = 26 * min(sparse.top_k, n_ctx) * n_ubatch
    if sparse.kind == QSA:
        return int((7 + 1.25 * sparse.n_head) * n_ctx * n_ubatch) + chosen
    if sparse.kind == DSV4:
        per_position = 4.5 if flash_attn else 7 + 1.25 * max(info.n_head, default=0)
        return int(per_position * (n_ctx + CONTEXT_MULTIPLE) * n_ubatch) + chosen
    per_position = 6 if flash_attn else 11
    return per_position * n_ctx * n_ubatch + chosen


def _dense_bytes(info: GgufInfo) -> int:
    """Without experts to route to, all weights are dense."""
    return info.dense_bytes + (0 if info.is_moe else info.expert_bytes)


def _padded(n_ctx: int, n_ubatch: int) -> tuple[int, int]:
    n_ctx = padded_context(n_ctx)
    return n_ctx, min(n_ubatch, n_ctx)
