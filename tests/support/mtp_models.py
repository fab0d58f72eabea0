"""A tiny model whose MTP block is right: each token has one that follows it, and the block knows which."""

from __future__ import annotations

import random
import shutil
from collections.abc import Collection
from pathlib import Path

import families
import numpy as np

FAMILY = "glm-4.5"
_FIRST, _LAST = 10, 300  # tokens that are said: none of them ends an answer


def followers(seed: int = 1) -> dict[int, int]:
    """What follows each token: all of them in one round."""
    tokens = list(range(_FIRST, _LAST))
    random.Random(seed).shuffle(tokens)
    return dict(zip(tokens, [*tokens[1:], tokens[0]], strict=True))


def make(
    path: Path, *, by_state: bool = False, wrong: Collection[int] = (), source: Path | None = None
) -> Path:
    """Writes the model, of F32. The block is right after every token but the ``wrong`` ones.

    ``source``: another model of the family. ``by_state``: the block does not look at the token, but at the
    state before, and so knows one token only: the state that it leaves itself is of the same token again.
    """
    from gguf import GGUFReader

    shutil.copyfile(source or families.folder(FAMILY) / "model.gguf", path)
    reader = GGUFReader(path, "r+")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name in tensors:
        if any(part in name for part in ("attn_output", "ffn_down")):
            tensors[name][:] = 0  # what is left is the token's embedding
        if name.endswith(("output_norm.weight", "enorm.weight", "hnorm.weight", "shared_head_norm.weight")):
            tensors[name][:] = 1
    embedding = tensors["token_embd.weight"]
    follows = followers()
    twice = {token: follows[after] for token, after in follows.items()}
    _write_head(tensors["output.weight"], embedding, follows)
    block = next(name for name in tensors if ".nextn." in name).split(".nextn.")[0] + ".nextn"
    tensors[f"{block}.embed_tokens.weight"][:] = embedding
    known = {token: after for token, after in (twice if by_state else follows).items() if token not in wrong}
    _write_head(tensors[f"{block}.shared_head_head.weight"], embedding, known)
    eye = np.eye(embedding.shape[1], dtype=np.float32)
    nothing = np.zeros_like(eye)
    pair = (nothing, eye) if by_state else (eye, nothing)
    tensors[f"{block}.eh_proj.weight"][:] = np.concatenate(pair, 1)
    reader.data.flush()
    return path


def _write_head(head: np.ndarray, embedding: np.ndarray, follows: dict[int, int]) -> None:
    head[:] = 0
    for token, after in follows.items():
        head[after] = embedding[token] / np.linalg.norm(embedding[token])
