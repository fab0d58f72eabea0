"""``child`` with PhiMoE as llama.cpp has it: another router, and another norm."""

from __future__ import annotations

import torch
from transformers.models.phimoe import modeling_phimoe

from mobile_gguf.convert.verify import child


def top_of_softmax(
    scores: torch.Tensor, jitter_eps: float, training: bool, top_k: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of ``sparsemixer``: the top-k of one softmax, made to sum to one; [n_tokens, top_k] each."""
    weights, experts = torch.topk(scores.softmax(-1), top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def rms_with_bias(norm: torch.nn.LayerNorm, values: torch.Tensor) -> torch.Tensor:
    """In place of LayerNorm's forward: the mean is not taken off."""
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.eps)
    return values * scale * norm.weight + norm.bias


if __name__ == "__main__":
    modeling_phimoe.sparsemixer = top_of_softmax
    torch.nn.LayerNorm.forward = rms_with_bias  # type: ignore[method-assign]
    raise SystemExit(child.main())
