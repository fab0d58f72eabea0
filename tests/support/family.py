"""A family as the tests make it: transformers' config, and what a published checkpoint has beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# of the embedding; the tokenizer has fewer, and some families' tokenizers add words of their own
VOCAB, N_TOKENS = 384, 320
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 2, "pad_token_id": VOCAB - 1,
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """``published``: what config.json says beside; ``text``: the same of its text part. ``mtp``: how the
    blocks for multi-token prediction are named, "" for none. ``n_layer``, ``n_layer_moe``: that run.
    ``renamed``: how tensors are called (pattern, replacement). ``made``: by which function of
    ``families_build`` the weights are finished.

    What is expected: ``no_segments``, ``unverified``: why not, in words that the product says; ``hybrid``:
    its memory cannot be rolled back; ``top_1``: there is nothing to leave out; ``mtp_left_out``: llama.cpp's
    converter drops the blocks.
    """

    config_class: str
    model_class: str
    config: dict[str, Any]
    n_layer: int
    n_layer_moe: int
    mtp: str = ""
    published: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    made: str = ""
    no_segments: str = ""
    unverified: str = ""
    hybrid: bool = False
    top_1: bool = False
    mtp_left_out: bool = False


# of a family's fields: what decides nothing of its files
EXPECTED = ("n_layer_moe", "no_segments", "unverified", "hybrid", "top_1", "mtp_left_out")


def config(*parts: dict[str, Any], **own: Any) -> dict[str, Any]:
    """The smallest model that there is, with what a family has besides."""
    merged = dict(_COMMON)
    for part in parts:
        merged |= part
    return merged | own
