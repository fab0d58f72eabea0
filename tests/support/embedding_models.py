"""Tiny embedding models of random weights, written by the gguf package: BERTs, one of them with experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_libs
import gguf
import numpy as np

N_LAYER, N_EMBD, N_FF, N_EXPERT, N_CTX = 4, 32, 64, 4, 64
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!-"

# What a reranker makes of the first token's state.
RANK_WEIGHTS, RANK_BIAS = np.linspace(-1, 1, N_EMBD, dtype=np.float32), 0.25


def write_bert(path: Path, *, moe: bool = False, pooling: gguf.PoolingType | None = None) -> Path:
    """An encoder with a WordPiece of letters; with ``moe`` every second layer has experts."""
    architecture = "nomic-bert-moe" if moe else "bert"
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny encoder")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-6)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if moe:
        writer.add_expert_count(N_EXPERT)
        writer.add_expert_used_count(2)
        writer.add_moe_every_n_layers(2)
    tokens = [*WORDS, *("\u2581" + letter for letter in LETTERS), *LETTERS]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(WORDS) + [1] * (len(tokens) - len(WORDS)))
    writer.add_token_type_count(1)
    for name, token in (("pad", 0), ("unk", 1), ("bos", 2), ("sep", 3), ("mask", 4)):
        getattr(writer, f"add_{name}_token_id")(token)

    def add(name: str, *shape: int) -> None:
        values = random.normal(size=shape).astype(np.float32)
        if "norm.weight" in name:
            values = 1 + values / 10
        elif "token_embd.weight" not in name:
            values /= shape[-1] ** 0.5
        writer.add_tensor(name, values)

    add("token_embd.weight", len(tokens), N_EMBD)
    add("token_types.weight", 1, N_EMBD)
    if not moe:
        add("position_embd.weight", N_CTX, N_EMBD)
    norms = ["token_embd_norm"]
    for i in range(N_LAYER):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", N_EMBD, N_EMBD)
            add(f"blk.{i}.{name}.bias", N_EMBD)
        norms += [f"blk.{i}.attn_output_norm", f"blk.{i}.layer_output_norm"]
        if moe and i % 2 == 1:
            add(f"blk.{i}.ffn_gate_inp.weight", N_EXPERT, N_EMBD)
            add(f"blk.{i}.ffn_up_exps.weight", N_EXPERT, N_FF, N_EMBD)
            add(f"blk.{i}.ffn_down_exps.weight", N_EXPERT, N_EMBD, N_FF)
        else:
            add(f"blk.{i}.ffn_up.weight", N_FF, N_EMBD)
            add(f"blk.{i}.ffn_up.bias", N_FF)
            add(f"blk.{i}.ffn_down.weight", N_EMBD, N_FF)
            add(f"blk.{i}.ffn_down.bias", N_EMBD)
    for name in norms:
        add(f"{name}.weight", N_EMBD)
        add(f"{name}.bias", N_EMBD)
    if pooling == gguf.PoolingType.RANK:
        writer.add_tensor("cls.output.weight", RANK_WEIGHTS[None])
        writer.add_tensor("cls.output.bias", np.full(1, RANK_BIAS, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_pooling(source: Path, path: Path, pooling: gguf.PoolingType) -> Path:
    """A copy of a model that asks for ``pooling``."""
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, architecture)
    key = f"{architecture}.pooling_type"
    copy_with_new_metadata(
        reader, writer, {key: MetadataDetails(gguf.GGUFValueType.UINT32, int(pooling))}, []
    )
    return path


_ORACLE = """
import json, sys
from llama_cpp import Llama
asked = json.load(sys.stdin)
options = {"embedding": True, "verbose": False, "n_threads": 1, "n_ctx": asked["n_ctx"]} | asked["options"]
llama = Llama(asked["path"], **options)
print(json.dumps([llama.embed(text, normalize=True) for text in asked["texts"]]))
"""


def oracle(path: Path, texts: list[str], n_ctx: int = 64, **options: Any) -> np.ndarray:
    """llama-cpp-python's own normalised embeddings by the stock llama.cpp, [n, n_embd]."""
    asked = {"path": str(path), "texts": texts, "n_ctx": n_ctx, "options": options}
    done = subprocess.run(
        [sys.executable, "-c", _ORACLE],
        input=json.dumps(asked), text=True, capture_output=True, check=False,
        env=engine_libs.child_environment(engine_libs.stock_lib()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout))
