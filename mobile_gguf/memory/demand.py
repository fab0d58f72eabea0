"""What a model takes of memory beside its experts, on the host and on devices: arithmetic of its header, and
of what an engine said its compute buffers take.

Where it said nothing they are estimated, on the high side: a budget that is too large gets the process
killed, one that is too small costs reads or misses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mobile_gguf.engine.buffers import NOT_MEASURED, Buffers, Context, Measured
from mobile_gguf.gguf.caches import CONTEXT_MULTIPLE, DSV4, F16_KV, QSA, KvTypes, padded_context
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import format_bytes

from .sequences import ONE, Sequences

DEFAULT_CONTEXT = 4096
# Tokens that a model's MTP block computes at once.
BLOCK_UBATCH = 128
_F16, _F32 = 2, 4
# The engine's vocabulary: token texts, two hash maps and the merges, measured at 300-400 bytes a token.
_VOCABULARY_BYTES = 400


@dataclass(frozen=True)
class Demand:
    """Weights that are no routed experts, what a context keeps (KV) and compute buffers, in bytes.

    ``compute_bytes`` are what llama.cpp reserves and logs. ``idle_bytes`` of it are never written to on the
    host, so no memory stands behind them: logits that nobody asks for. ``vocabulary_bytes``: token texts.
    """

    dense_bytes: int
    kv_bytes: int
    compute_bytes: int
    idle_bytes: int = 0
    vocabulary_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.buffer_bytes

    @property
    def buffer_bytes(self) -> int:
        """What is neither weights nor kept by a context: buffers as far as they are used, the vocabulary."""
        return self.compute_bytes - self.idle_bytes + self.vocabulary_bytes

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.dense_bytes + other.dense_bytes,
            self.kv_bytes + other.kv_bytes,
            self.compute_bytes + other.compute_bytes,
            self.idle_bytes + other.idle_bytes,
            self.vocabulary_bytes + other.vocabulary_bytes,
        )

    def __sub__(self, other: Demand) -> Demand:
        return Demand(
            self.dense_bytes - other.dense_bytes,
            self.kv_bytes - other.kv_bytes,
            self.compute_bytes - other.compute_bytes,
            self.idle_bytes - other.idle_bytes,
            self.vocabulary_bytes - other.vocabulary_bytes,
        )

    def __str__(self) -> str:
        return (
            f"dense weights {format_bytes(self.dense_bytes)}, KV {format_bytes(self.kv_bytes)}, "
            f"buffers {format_bytes(self.buffer_bytes)}"
        )


def context_size(info: GgufInfo, asked: int | None) -> int:
    """Tokens of context: as asked, 0 for the model's own; what an automatic one begins with if not."""
    trained = info.n_ctx_train or DEFAULT_CONTEXT
    if asked is None:
        return min(DEFAULT_CONTEXT, trained)
    return asked or trained


def estimate_demand(
    info: GgufInfo,
    *,
    n_ctx: int,
    n_ubatch: int,
    flash_attn: bool = False,
    kv: KvTypes = F16_KV,
    measured: Measured = NOT_MEASURED,
    sequences: Sequences = ONE,
) -> Demand:
    """The demand with all layers on the host, for a context of ``n_ctx`` tokens."""
    context = context_of(n_ctx, n_ubatch, flash_attn)
    buffers = compute_buffers(info, context, measured)
    logits = sequences.logits_bytes(info) + (_block_bytes(info, context) if info.runs_mtp else 0)
    return Demand(
        _dense_bytes(info),
        sequences.kept_bytes(info, context.n_ctx, flash_attn, kv),
        buffers.reserved + logits,
        idle_bytes=buffers.reserved - buffers.used,
        vocabulary_bytes=info.n_vocab * _VOCABULARY_BYTES,
    )


def estimate_device_demand(
    info: GgufInfo,
    *,
    n_ctx: int,
    n_ubatch: int,
    flash_attn: bool = False,
    kv: KvTypes = F16_KV,
    measured: Measured = NOT_MEASURED,
    sequences: Sequences = ONE,
) -> Demand:
    """The demand on devices that have all layers; what is reserved has real memory there.

    Measured is the host's graph. With slots a layer's experts are computed in two chains, so the estimate
    counts where it is higher.
    """
    context = context_of(n_ctx, n_ubatch, flash_attn)
    kept = sequences.kept_bytes(info, context.n_ctx, flash_attn, kv)
    reserved = max(compute_buffers(info, context, one).reserved for one in (measured, NOT_MEASURED))
    return Demand(_dense_bytes(info), kept, reserved + sequences.logits_bytes(info))


def host_share(demand: Demand, info: GgufInfo) -> Demand:
    """What stays in host memory when all layers are on devices: the token embedding, and buffers."""
    return replace(demand, dense_bytes=min(info.embedding_bytes, demand.dense_bytes), kv_bytes=0)


def kv_cache_bytes(info: GgufInfo, n_ctx: int, flash_attn: bool = False, kv: KvTypes = F16_KV) -> int:
    """Keys, values, indexers' keys and states of a context, as ``mobile_gguf/gguf/caches.py`` counts them."""
    return info.caches.n_bytes(n_ctx, flash_attn, kv)


def context_of(n_ctx: int, n_ubatch: int, flash_attn: bool) -> Context:
    """A context as the engine makes it."""
    n_ctx = padded_context(n_ctx)
    return Context(n_ctx, min(n_ubatch, n_ctx), flash_attn)


def compute_buffers(info: GgufInfo, context: Context, measured: Measured = NOT_MEASURED) -> Buffers:
    """As they were measured, else as they are estimated from the header.

    Measured are whole experts; of segments each has an output of its own.
    """
    found = measured.at(context)
    if found is None:
        return _estimated(info, context)
    outputs = (info.segments - 1) * info.n_embd * max(1, info.n_expert_used) * context.n_ubatch * _F32
    return Buffers(found.reserved + outputs, found.used + outputs)


def _block_bytes(info: GgufInfo, context: Context) -> int:
    """What the context of a model's MTP block computes in, and the states of a batch that go into it."""
    n_ctx, n_ubatch, flash_attn = context
    shape = n_ctx, min(n_ubatch, BLOCK_UBATCH), flash_attn
    used = _activation_bytes(info, *shape) - _sparse_bytes(info, *shape)  # it attends to all positions
    return used + (info.n_vocab + n_ubatch * info.n_embd) * _F32


def _estimated(info: GgufInfo, context: Context) -> Buffers:
    n_ctx, n_ubatch, flash_attn = context
    logits = info.n_vocab * _F32
    used = _activation_bytes(info, n_ctx, n_ubatch, flash_attn) + min(n_ubatch, 2) * logits
    # when the logits are made, hardly anything else is needed any more
    return Buffers(max(used, n_ubatch * (logits + 10 * info.n_embd * _F32)), used)


def _activation_bytes(info: GgufInfo, n_ctx: int, n_ubatch: int, flash_attn: bool) -> int:
    """Without flash attention the scores [heads, n_ctx, n_ubatch] dominate."""
    caches = info.caches
    masks = (2 if caches.windows else 1) * (_F16 if flash_attn else _F32)
    scores = 0 if flash_attn else max(info.n_head, default=0) * _F32
    transposed = 0 if flash_attn else n_ctx * caches.latent * _F16
    routed = max(1, info.n_expert_used)
    outputs = (info.segments + 1) * info.n_embd  # of each expert: of its segments, and their sum
    streams = info.metadata.get(f"{info.architecture}.hyper_connection.count")
    streams = streams if isinstance(streams, int) else 0  # of residuals, side by side
    activations = n_ubatch * ((9 + streams) * info.n_embd + routed * (3 * info.n_ff_expert + outputs)) * _F32
    attention = n_ctx * n_ubatch * (scores + masks)
    return attention + transposed + activations + _sparse_bytes(info, n_ctx, n_ubatch, flash_attn)


def _sparse_bytes(info: GgufInfo, n_ctx: int, n_ubatch: int, flash_attn: bool) -> int:
    """What choosing positions takes: indexers' scores, the order of the chosen, and masks made of it.

    Bytes per position and token as the pinned llama.cpp allocates them, by its graphs' largest moment.
    """
    caches = info.caches
    sparse = caches.sparse
    if not sparse.kind:
        return 0
    chosen = 26 * min(sparse.top_k, n_ctx) * n_ubatch
    if sparse.kind == QSA:
        return int((7 + 1.25 * sparse.n_head) * n_ctx * n_ubatch) + chosen
    if sparse.kind == DSV4:
        per_position = 4.5 if flash_attn else 7 + 1.25 * max(info.n_head, default=0)
        keys = 3 * n_ctx * caches.attention.keys // max(1, info.n_layer)  # of all kinds, one after another
        return int(per_position * (n_ctx + CONTEXT_MULTIPLE) * n_ubatch) + keys + chosen
    per_position = 6 if flash_attn else 11
    return per_position * n_ctx * n_ubatch + chosen


def _dense_bytes(info: GgufInfo) -> int:
    """Without experts to route to, all weights are dense."""
    return info.dense_bytes + (0 if info.is_moe else info.expert_bytes)
