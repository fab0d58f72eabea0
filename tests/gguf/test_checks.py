"""Headers that llama.cpp would not survive are refused, with the key, its value and what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mobile_gguf.convert.gguf.file import GgufSource
from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf.info import read_gguf_info

N_LAYER, N_EXPERT, N_EMBD, N_FF, N_TOKENS = 2, 8, 32, 16, 12
ARCHITECTURE = "deepseek2"
GOOD: dict[str, Any] = {
    "block_count": N_LAYER,
    "context_length": 128,
    "embedding_length": N_EMBD,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
    "rope.scaling.type": "yarn",
    "expert_count": N_EXPERT,
    "expert_used_count": 2,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
    "expert_gating_func": 2,
}


def write(path: Path, *, n_scores: int = N_TOKENS, n_rows: int = N_TOKENS, **changes: Any) -> Path:
    """A header as an architecture with all of it would have; ``changes`` by key, None leaves it out."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in (GOOD | {name.replace("__", "."): value for name, value in changes.items()}).items():
        name = f"{ARCHITECTURE}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32)(name, value)
    writer.add_token_list([f"t{i}" for i in range(N_TOKENS)])
    writer.add_token_scores([0.0] * n_scores)
    writer.add_tensor("token_embd.weight", np.zeros((n_rows, N_EMBD), np.float32))
    for layer in range(N_LAYER):
        for matrix, shape in (("up", (N_FF, N_EMBD)), ("gate", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            name = f"blk.{layer}.ffn_{matrix}_exps.weight"
            writer.add_tensor(name, np.zeros((N_EXPERT, *shape), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_that_goes_together(tmp_path: Path) -> None:
    assert read_gguf_info(write(tmp_path / "good.gguf")).n_expert_used == 2
    varied = write(
        tmp_path / "varied.gguf", attention__head_count_kv=[0, 4], expert_used_count=[1, 8], n_scores=20
    )
    assert read_gguf_info(varied).n_expert_used == 8
    GgufSource.open(varied).close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_used_count": 9}, "expert_used_count is 9, not 1 to 8 (expert_count)"),
        ({"expert_used_count": 0}, "expert_used_count is 0, not 1 to 8 (expert_count)"),
        ({"expert_used_count": [2, 9]}, "expert_used_count is [2, 9], not 1 to 8 (expert_count)"),
        ({"expert_count": 0}, "expert_used_count is 2, not 0, as expert_count is"),
        ({"expert_count": 16}, "expert_count is 16, not 8, the experts of tensor blk.0.ffn_up_exps.weight"),
        ({"expert_count": 1025}, "expert_count is 1025, not at most 1024"),
        ({"expert_group_count": 3}, "expert_group_count is 3, not a divisor of 8 (expert_count)"),
        ({"expert_group_count": 8}, "expert_group_count is 8, not a divisor of 8 (expert_count)"),
        ({"expert_group_used_count": 4}, "expert_group_used_count is 4, not 1 to 3"),
        ({"expert_group_used_count": None}, "expert_group_used_count is None, not 1 to 3"),
        ({"expert_gating_func": 5}, "expert_gating_func is 5, not at most 4"),
        ({"block_count": 0}, "block_count is 0, not at least 1"),
        ({"block_count": 513}, "block_count is 513, not at most 512"),
        ({"nextn_predict_layers": 3}, "nextn_predict_layers is 3, not at most 2"),
        ({"context_length": 0}, "context_length is 0, not at least 1"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0, not at least 1"),
        ({"embedding_length": -1}, "embedding_length is -1, not a number from 0 to 2147483647"),
        ({"embedding_length": 64}, "embedding_length is 64, not 32, the columns of tensor token_embd.weight"),
        ({"embedding_length": "32"}, "embedding_length is '32', not a whole number"),
        ({"attention.head_count_kv": 3}, "attention.head_count_kv is 3, not a divisor of 4"),
        ({"attention.head_count_kv": [2, 8]}, "attention.head_count_kv is [2, 8], not a divisor of 4"),
        ({"attention.head_count": [4, 4, 4]}, "attention.head_count is [4, 4, 4], not one number, or 2"),
        ({"attention.key_length": 0}, "attention.key_length is 0, not at least 1"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon is -1.0, not 0 or more"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan, not a finite number"),
        ({"expert_weights_scale": float("inf")}, "expert_weights_scale is inf, not a finite number"),
        ({"some.floats": [1.0, float("nan")]}, "some.floats is [1.0, nan], not a finite number"),
        ({"rope.dimension_count": 7}, "rope.dimension_count is 7, not an even number up to 8"),
        ({"rope.dimension_count": 10}, "rope.dimension_count is 10, not an even number up to 8"),
        ({"rope.freq_base": 0.0}, "rope.freq_base is 0.0, not more than 0"),
        ({"rope.scaling.type": "su"}, "rope.scaling.type is 'su', not none, linear, yarn or longrope"),
        ({"pooling_type": 9}, "pooling_type is 9, not at most 4"),
        ({"n_scores": 11}, "tokenizer.ggml.scores has 11 entries, not 12"),
        (
            {"n_rows": 13},
            "tokenizer.ggml.tokens has 12 entries, not 13, the rows of tensor token_embd.weight",
        ),
    ],
    ids=str,
)
def test_a_number_that_does_not(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "bad.gguf", **{name.replace(".", "__"): value for name, value in changes.items()})
    for read in (read_gguf_info, GgufSource.open):
        with pytest.raises(ModelFormatError) as error:
            read(path)
        assert said in str(error.value)
        assert str(error.value).startswith(f"{path} cannot be used: metadata ")
