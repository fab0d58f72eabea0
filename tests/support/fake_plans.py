"""A model as plans of memory see it, with numbers that are easy to add."""

from __future__ import annotations

from fake_backend import fake_caches, fake_info

from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.sizes import GIB, MIB

# 8 KiB of KV a token; 8 GiB of experts
EIGHT_GIB = fake_info(
    n_layer=8,
    n_head=(8,) * 8,
    caches=fake_caches((2,) * 8, 128, 128),
    n_ctx_train=131072,
    n_embd=1024,
    n_vocab=32000,
    n_expert=64,
    n_expert_used=8,
    expert_layers=(ExpertLayer(64, (8 * MIB, 8 * MIB)),) * 8,
    tensor_bytes=9 * GIB,
)
