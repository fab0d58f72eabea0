"""Small MoE files for layout tests, written by the gguf package, and children that convert under limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_LAYER, N_EXPERT, N_EMBD, N_FF = 2, 4, 32, 64


def write_sample(
    path: Path,
    *,
    kind: str = "F32",
    merged: bool = False,
    moe: bool = True,
    n_expert: int = N_EXPERT,
    n_ff: int = N_FF,
    skip: str = "",
    more: dict[str, np.ndarray] | None = None,
    architecture: str = "qwen3moe",
    alignment: int = 0,
    n_tokens: int = 5000,
    split_max_tensors: int = 0,
) -> Path:
    """A stacked MoE of random weights, layer 0 with its experts first; ``skip`` leaves that tensor out."""
    rng = np.random.default_rng(3)
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("Sample — ✓")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(64)
    writer.add_embedding_length(N_EMBD)
    writer.add_head_count([4, 2])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_bool("sample.flag", True)
    writer.add_float64("sample.double", 0.1)
    writer.add_int64("sample.negative", -(1 << 40))
    writer.add_array("sample.empty_strings", ["", "x"])
    writer.add_token_list([f"t{i}" for i in range(n_tokens)])
    writer.add_token_scores([float(i) for i in range(n_tokens)])
    if moe:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(n_ff)

    def add(name: str, *shape: int, quantized: bool = True) -> None:
        if name == skip:
            return
        values = rng.normal(size=shape).astype(np.float32)
        stored = type_ if quantized else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)

    for layer in range(N_LAYER):
        if moe:
            ups = {"gate_up": 2 * n_ff} if merged else {"gate": n_ff, "up": n_ff}
            for matrix, rows in ups.items():
                add(f"blk.{layer}.ffn_{matrix}_exps.weight", n_expert, rows, N_EMBD)
            add(f"blk.{layer}.ffn_gate_inp.weight", n_expert, N_EMBD, quantized=False)
            add(f"blk.{layer}.ffn_down_exps.weight", n_expert, N_EMBD, n_ff)
        add(f"blk.{layer}.attn_norm.weight", N_EMBD, quantized=False)
    add("token_embd.weight", n_tokens, N_EMBD)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split_max_tensors else min(path.parent.glob(f"{path.stem}-*.gguf"))


def contents(path: Path, ours: bool = False) -> dict[str, Any]:
    """A file's metadata as the gguf package reads it, with the values' types; ``ours``: mobile.* too."""
    return {
        key: (field.types, field.contents())
        for key, field in gguf.GGUFReader(path).fields.items()
        if not key.startswith("GGUF.") and (ours or not key.startswith("mobile."))
    }


def tensors(path: Path) -> dict[str, Any]:
    """A file's tensors as the gguf package reads them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def in_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, for limits and signals; sys.argv[1:] are the arguments."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
