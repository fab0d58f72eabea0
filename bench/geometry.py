"""The shape of a benchmark model: a trace's layers, experts and top-k, scaled to a size in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mobile_gguf.errors import UsageError
from mobile_gguf.sizes import format_bytes

from .text import SPARE_TOKENS
from .trace import Trace

Q4_0_BLOCK, Q4_0_BLOCK_BYTES = 32, 18
HEAD_SIZE = 64
# Qwen3-30B-A3B: hidden 2048, expert 768, 32 heads of 128, 4 for keys and values. The ratios are kept, so
# the hidden size is a multiple of 256.
HIDDEN_STEP = 256
HIDDEN_PER_EXPERT_FF = 2048 / 768
SMALLEST_HIDDEN = 512


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a ``qwen3moe`` model; bytes are those of its tensors in Q4_0 (norms, router: F32)."""

    n_layer: int
    n_expert: int
    k: int
    n_embd: int
    n_ff: int
    n_vocab: int
    right: float = 1.0  # how often the head says the trace's next step

    @property
    def n_head(self) -> int:
        return 2 * self.n_embd // HEAD_SIZE

    @property
    def n_head_kv(self) -> int:
        return self.n_embd // 4 // HEAD_SIZE

    @property
    def expert_bytes(self) -> int:
        """One expert: gate, up and down."""
        return 3 * self.n_embd * self.n_ff // Q4_0_BLOCK * Q4_0_BLOCK_BYTES

    @property
    def all_expert_bytes(self) -> int:
        return self.n_layer * self.n_expert * self.expert_bytes

    @property
    def layer_expert_bytes(self) -> int:
        """The smallest budget an expert store can work with."""
        return self.n_expert * self.expert_bytes

    @property
    def dense_bytes(self) -> int:
        attention = 2 * self.n_embd * HEAD_SIZE * (self.n_head + self.n_head_kv)
        per_layer = attention // Q4_0_BLOCK * Q4_0_BLOCK_BYTES
        per_layer += 4 * (self.n_embd * self.n_expert + 2 * self.n_embd + 2 * HEAD_SIZE)
        return self.n_layer * per_layer + 4 * self.n_embd * (2 * self.n_vocab + 1)

    @property
    def file_bytes(self) -> int:
        """Tensor bytes of the file; its header adds less than a MiB."""
        return self.all_expert_bytes + self.dense_bytes


def scale_model(trace: Trace, size_bytes: int, right: float = 1.0) -> ModelShape:
    """The shape whose experts take about ``size_bytes``; they come within a few percent of it.

    The hidden size is at least the number of steps, because each step's token has a dimension of its own.
    Raises UsageError if the trace's geometry cannot be that small.
    """
    n_experts = trace.n_layer * trace.n_expert
    weights = size_bytes / n_experts / Q4_0_BLOCK_BYTES * Q4_0_BLOCK / 3  # of one of the three matrices
    smallest_hidden = max(SMALLEST_HIDDEN, math.ceil(trace.n_steps / HIDDEN_STEP) * HIDDEN_STEP)
    wanted = round(math.sqrt(weights * HIDDEN_PER_EXPERT_FF) / HIDDEN_STEP) * HIDDEN_STEP
    n_embd = max(smallest_hidden, wanted)
    n_ff = round(weights / n_embd / Q4_0_BLOCK) * Q4_0_BLOCK
    if n_ff < Q4_0_BLOCK:
        least = 3 * smallest_hidden * Q4_0_BLOCK_BYTES * n_experts
        raise UsageError(
            f"a model of {trace.n_layer} layers x {trace.n_expert} experts for {trace.n_steps} steps "
            f"cannot be as small as {format_bytes(size_bytes)}: ask for at least {format_bytes(least)}"
        )
    return ModelShape(
        trace.n_layer, trace.n_expert, trace.k, n_embd, n_ff, trace.n_steps + SPARE_TOKENS, right
    )  # fmt: skip
