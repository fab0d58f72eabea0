"""Headers of models as large as people run them, and files of nothing else: their weights are a hole.

The tensors are those that the pinned llama.cpp asks for: it loads these headers (``test_real_models.py``),
so none is missing and no shape is wrong. ``real_dimensions.py`` has the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_Q4, _Q8, _F32, _I32 = (GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "F32", "I32"))
N_GRAM_ROWS = "n-gram rows"  # no key of a header: the table's own shape says it


@dataclass(frozen=True)
class Tensor:
    """``shape`` as ggml has it, rows first; ``kind`` None: by its shape."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType | None = None

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def type(self) -> GGMLQuantizationType:
        if self.kind is not None:
            return self.kind
        if "_exps." in self.name or self.name.startswith("per_layer_token_embd"):
            return _Q4 if self.name.endswith("weight") else _F32
        return _Q8 if len(self.shape) > 1 and self.shape[0] % 32 == 0 else _F32

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.n_values // block * size


class Counts(NamedTuple):
    """Parameters. ``active``: what a token is multiplied with, so without embeddings that are looked up."""

    total: int
    experts: int
    dense: int
    table: int
    active: int


@dataclass(frozen=True)
class RealModel:
    """``total`` and ``active`` are parameters as the makers state them, in billions; ``total`` is of what the
    text model and its tables hold. ``numbers`` are keys of the architecture."""

    name: str
    architecture: str
    total: float
    active: float
    source: str
    numbers: dict[str, Any]
    tied: bool = False  # the output is the token embedding

    def __getitem__(self, key: str) -> Any:
        return self.numbers[key]

    def get(self, key: str, default: int = 0) -> Any:
        return self.numbers.get(key, default)

    @property
    def n_embd(self) -> int:
        return self["embedding_length"]

    @property
    def n_block(self) -> int:
        return self["block_count"]

    @property
    def n_layer(self) -> int:
        return self.n_block - self.get("nextn_predict_layers")

    @property
    def counts(self) -> Counts:
        """Of the layers that run."""
        idle = tuple(f"blk.{block}." for block in range(self.n_layer, self.n_block))
        running = [tensor for tensor in self.tensors() if not tensor.name.startswith(idle or "-")]
        total = sum(tensor.n_values for tensor in running)
        experts = sum(tensor.n_values for tensor in running if "_exps.weight" in tensor.name)
        table = sum(tensor.n_values for tensor in running if tensor.name.startswith("per_layer_token_embd"))
        looked_up = 0 if self.tied else self.n_embd * self["vocab_size"]
        chosen = experts * self["expert_used_count"] // self["expert_count"]
        dense = total - experts - table
        return Counts(total, experts, dense, table, dense - looked_up + chosen)

    def tensors(self) -> Iterator[Tensor]:
        yield Tensor("token_embd.weight", (self.n_embd, self["vocab_size"]))
        if not self.tied:
            yield Tensor("output.weight", (self.n_embd, self["vocab_size"]))
        yield from _TOP.get(self.architecture, _top)(self)
        for block in range(self.n_block):
            for name, *shape in _BLOCKS[self.architecture](self, block):
                kind = {"exps": _Q4, "i32": _I32, "f32": _F32}.get(shape[-1])
                sizes = tuple(size for size in shape if isinstance(size, int))
                suffix = "" if "." in name or name == "ssm_a" else ".weight"
                yield Tensor(f"blk.{block}.{name}{suffix}", sizes, kind)
            if block >= self.n_layer:
                yield Tensor(f"blk.{block}.nextn.eh_proj.weight", (2 * self.n_embd, self.n_embd))
                for name in ("enorm", "hnorm", "shared_head_norm"):
                    yield Tensor(f"blk.{block}.nextn.{name}.weight", (self.n_embd,))

    def write(self, path: Path) -> Path:
        """A GGUF of this header; the weights are a hole in the file."""
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_name(self.name)
        writer.add_tokenizer_model("none")
        for key, value in self.numbers.items():
            if key == N_GRAM_ROWS:
                continue
            _add(writer, f"{self.architecture}.{key}", value)
        size = 0
        for tensor in self.tensors():
            rows = tuple(reversed(tensor.shape))
            if tensor.type in (_F32, _I32):
                kind = np.dtype(np.float32 if tensor.type == _F32 else np.int32)
                writer.add_tensor_info(tensor.name, rows, kind, tensor.n_bytes)
            else:
                block, n_bytes = GGML_QUANT_SIZES[tensor.type]
                packed = (*rows[:-1], rows[-1] // block * n_bytes)
                writer.add_tensor_info(tensor.name, packed, np.dtype(np.uint8), tensor.n_bytes, tensor.type)
            size += -(-tensor.n_bytes // 32) * 32
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(path, "r+b") as file:
            file.truncate(file.seek(0, 2) + 32 + size)
        return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list) and ".ple." in key and not key.endswith("layers"):
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT64)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


# tensors of a block: name without the block, sizes, and at the end a kind where it is not that of its shape


def _top(m: RealModel) -> Iterator[Tensor]:
    yield Tensor("output_norm.weight", (m.n_embd,))


def _attention(m: RealModel, n_q: int = 1) -> Iterator[tuple[Any, ...]]:
    """``n_q``: 2 where every query has a gate beside it."""
    head = m["attention.key_length"]
    n_heads, n_kv = m["attention.head_count"], m["attention.head_count_kv"]
    yield "attn_q", m.n_embd, n_q * n_heads * head
    yield "attn_k", m.n_embd, n_kv * head
    yield "attn_v", m.n_embd, n_kv * head
    yield "attn_output", n_heads * head, m.n_embd


def _head_norms(m: RealModel) -> Iterator[tuple[Any, ...]]:
    yield "attn_q_norm", m["attention.key_length"]
    yield "attn_k_norm", m["attention.key_length"]


def _experts(m: RealModel) -> Iterator[tuple[Any, ...]]:
    n_expert, n_ff = m["expert_count"], m["expert_feed_forward_length"]
    yield "ffn_gate_inp", m.n_embd, n_expert, "f32"
    yield "ffn_gate_exps", m.n_embd, n_ff, n_expert
    yield "ffn_up_exps", m.n_embd, n_ff, n_expert
    yield "ffn_down_exps", n_ff, m.n_embd, n_expert


def _feed_forward(m: RealModel, suffix: str, n_ff: int) -> Iterator[tuple[Any, ...]]:
    yield f"ffn_gate{suffix}", m.n_embd, n_ff
    yield f"ffn_up{suffix}", m.n_embd, n_ff
    yield f"ffn_down{suffix}", n_ff, m.n_embd


def _qwen3moe(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    yield "attn_norm", m.n_embd
    yield from _attention(m)
    yield from _head_norms(m)
    yield "ffn_norm", m.n_embd
    yield from _experts(m)


def _delta_net(m: RealModel) -> Iterator[tuple[Any, ...]]:
    state, n_k, n_v = m["ssm.state_size"], m["ssm.group_count"], m["ssm.time_step_rank"]
    keys, values = n_k * state, n_v * state
    yield "attn_qkv", m.n_embd, 2 * keys + values
    yield "attn_gate", m.n_embd, values
    yield "ssm_conv1d", m["ssm.conv_kernel"], 2 * keys + values
    yield "ssm_dt.bias", n_v
    yield "ssm_a", n_v
    if m.architecture == "qwen3next":
        yield "ssm_ba", m.n_embd, 2 * n_v
    else:
        yield "ssm_beta", m.n_embd, n_v
        yield "ssm_alpha", m.n_embd, n_v
    yield "ssm_norm", state
    yield "ssm_out", values, m.n_embd


def _attends(m: RealModel, block: int) -> bool:
    return block >= m.n_layer or (block + 1) % m["full_attention_interval"] == 0


def _shared_expert(m: RealModel) -> Iterator[tuple[Any, ...]]:
    yield "ffn_gate_inp_shexp", m.n_embd
    yield from _feed_forward(m, "_shexp", m["expert_shared_feed_forward_length"])


def _hybrid(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    yield "attn_norm", m.n_embd
    yield "post_attention_norm", m.n_embd
    if _attends(m, block):
        yield from _attention(m, 2)
        yield from _head_norms(m)
    else:
        yield from _delta_net(m)
    yield from _experts(m)
    yield from _shared_expert(m)


def _qwen4exp(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    streams, rank = m["hyper_connection.count"], m["hyper_connection.low_rank"]
    width = streams * m.n_embd
    for part in ("attn", "ffn"):
        yield f"hc_{part}_norm", m.n_embd, streams, "f32"
        yield f"hc_{part}_down", width, rank
        yield f"hc_{part}_up", rank, width
        yield f"hc_{part}_inject", width, streams
    if _attends(m, block):
        length = m["attention.indexer.key_length"]
        yield from _attention(m, 2)
        yield from _head_norms(m)
        yield "indexer.q_proj.weight", m.n_embd, m["attention.indexer.head_count"] * length
        yield "indexer.k_proj.weight", m.n_embd, length
        yield "indexer.q_norm.weight", length
        yield "indexer.k_norm.weight", length
    else:
        yield from _delta_net(m)
    if block in m["ple.layers"]:
        yield "ple_key", m.n_embd, width
        yield "ple_value", m.n_embd, m.n_embd
        for name in ("key", "query", "conv"):
            yield f"ple_norm_{name}", m.n_embd, streams, "f32"
        yield "ple_conv1d", m["ple.conv_kernel"], width
    yield from _experts(m)
    yield from _shared_expert(m)


def _qwen4exp_top(m: RealModel) -> Iterator[Tensor]:
    width, rank = m["hyper_connection.count"] * m.n_embd, m["hyper_connection.low_rank"]
    yield Tensor("output_hc_norm.weight", (m.n_embd, m["hyper_connection.count"]), _F32)
    yield Tensor("output_hc_down.weight", (width, rank))
    yield Tensor("output_hc_up.weight", (rank, width))
    yield Tensor("per_layer_token_embd.weight", (m["embedding_length_per_layer_input"], m[N_GRAM_ROWS]))


def _gpt_oss(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    head, n_heads, n_kv = (m[f"attention.{key}"] for key in ("key_length", "head_count", "head_count_kv"))
    n_expert, n_ff = m["expert_count"], m["expert_feed_forward_length"]
    yield "attn_norm", m.n_embd
    yield "post_attention_norm", m.n_embd
    yield from _attention(m)
    yield "attn_q.bias", n_heads * head
    yield "attn_k.bias", n_kv * head
    yield "attn_v.bias", n_kv * head
    yield "attn_output.bias", m.n_embd
    yield "attn_sinks", n_heads
    yield from _experts(m)
    yield "ffn_gate_inp.bias", n_expert
    yield "ffn_gate_exps.bias", n_ff, n_expert, "f32"
    yield "ffn_up_exps.bias", n_ff, n_expert, "f32"
    yield "ffn_down_exps.bias", m.n_embd, n_expert, "f32"


def _glm(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    """What is behind attention in the GLM families, and in DeepSeek's."""
    if block < m["leading_dense_block_count"]:
        yield from _feed_forward(m, "", m["feed_forward_length"])
        return
    yield from _experts(m)
    yield "exp_probs_b.bias", m["expert_count"]
    yield from _feed_forward(m, "_shexp", m["expert_shared_count"] * m["expert_feed_forward_length"])


def _glm4moe(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    head, n_heads, n_kv = (m[f"attention.{key}"] for key in ("key_length", "head_count", "head_count_kv"))
    yield "attn_norm", m.n_embd
    yield from _attention(m)
    yield "attn_q.bias", n_heads * head
    yield "attn_k.bias", n_kv * head
    yield "attn_v.bias", n_kv * head
    yield "post_attention_norm", m.n_embd
    yield from _glm(m, block)


def _deepseek2(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    n_heads, rank, rope = m["attention.head_count"], m["attention.kv_lora_rank"], m["rope.dimension_count"]
    keys, values = m["attention.key_length_mla"], m["attention.value_length_mla"]
    q_rank = m["attention.q_lora_rank"]
    yield "attn_norm", m.n_embd
    yield "attn_q_a", m.n_embd, q_rank
    yield "attn_q_a_norm", q_rank
    yield "attn_q_b", q_rank, n_heads * keys
    yield "attn_kv_a_mqa", m.n_embd, rank + rope
    yield "attn_kv_a_norm", rank
    yield "attn_k_b", keys - rope, rank, n_heads
    yield "attn_v_b", rank, values, n_heads
    yield "attn_output", n_heads * values, m.n_embd
    yield "ffn_norm", m.n_embd
    yield from _glm(m, block)


def _gemma4(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    window = m["attention.sliding_window_pattern"][block]
    head = m["attention.key_length_swa" if window else "attention.key_length"]
    keys = m["attention.head_count_kv"][block] * head
    n_heads, n_expert, n_ff = m["attention.head_count"], m["expert_count"], m["expert_feed_forward_length"]
    yield "attn_norm", m.n_embd
    yield "attn_q", m.n_embd, n_heads * head
    yield "attn_k", m.n_embd, keys
    if window:  # the others' values are their keys
        yield "attn_v", m.n_embd, keys
    yield "attn_output", n_heads * head, m.n_embd
    yield "attn_q_norm", head
    yield "attn_k_norm", head
    yield "layer_output_scale", 1
    yield "ffn_gate_inp", m.n_embd, n_expert, "f32"
    yield "ffn_gate_inp.scale", m.n_embd
    yield "ffn_gate_up_exps", m.n_embd, 2 * n_ff, n_expert
    yield "ffn_down_exps", n_ff, m.n_embd, n_expert
    yield "ffn_down_exps.scale", n_expert
    yield from _feed_forward(m, "", m["feed_forward_length"])
    for name in ("post_attention_norm", "ffn_norm", "post_ffw_norm", "pre_ffw_norm_2", "post_ffw_norm_1",
                 "post_ffw_norm_2"):  # fmt: skip
        yield name, m.n_embd


def _gemma4_top(m: RealModel) -> Iterator[Tensor]:
    yield Tensor("rope_freqs.weight", (m["attention.key_length"] // 2,))
    yield from _top(m)


def _deepseek4(m: RealModel, block: int) -> Iterator[tuple[Any, ...]]:
    n_heads, head, q_rank = m["attention.head_count"], m["attention.key_length"], m["attention.q_lora_rank"]
    groups, o_rank = m["attention.output_group_count"], m["attention.output_lora_rank"]
    streams = m["hyper_connection.count"]
    mixed = (2 + streams) * streams
    yield "attn_norm", m.n_embd
    yield "attn_sinks", n_heads
    yield "attn_q_a", m.n_embd, q_rank
    yield "attn_q_a_norm", q_rank
    yield "attn_q_b", q_rank, n_heads * head
    yield "attn_kv", m.n_embd, head
    yield "attn_kv_a_norm", head
    yield "attn_output_a", n_heads * head // groups, o_rank * groups
    yield "attn_output_b", groups * o_rank, m.n_embd
    for part in ("attn", "ffn"):
        yield f"hc_{part}_fn", streams * m.n_embd, mixed
        yield f"hc_{part}_base", mixed
        yield f"hc_{part}_scale", 3
    ratio = m["attention.compress_ratios"][block]
    if ratio:
        width = (2 if ratio == 4 else 1) * head
        yield "attn_compressor_kv", m.n_embd, width
        yield "attn_compressor_gate", m.n_embd, width
        yield "attn_compressor_ape", width, ratio, "f32"
        yield "attn_compressor_norm", head
    if ratio == 4:
        length, n_index = m["attention.indexer.key_length"], m["attention.indexer.head_count"]
        yield "indexer.proj.weight", m.n_embd, n_index
        yield "indexer.attn_q_b.weight", q_rank, n_index * length
        yield "indexer_compressor_kv", m.n_embd, 2 * length
        yield "indexer_compressor_gate", m.n_embd, 2 * length
        yield "indexer_compressor_ape", 2 * length, ratio, "f32"
        yield "indexer_compressor_norm", length
    yield "ffn_norm", m.n_embd
    yield from _experts(m)
    if block < m["hash_layer_count"]:
        yield "ffn_gate_tid2eid", m["expert_used_count"], m["vocab_size"], "i32"
    else:
        yield "exp_probs_b.bias", m["expert_count"]
    yield from _feed_forward(m, "_shexp", m["expert_shared_count"] * m["expert_feed_forward_length"])


def _deepseek4_top(m: RealModel) -> Iterator[Tensor]:
    streams = m["hyper_connection.count"]
    yield Tensor("output_hc_fn.weight", (streams * m.n_embd, streams))
    yield Tensor("output_hc_base.weight", (streams,))
    yield Tensor("output_hc_scale.weight", (1,))
    yield from _top(m)


_BLOCKS = {
    "qwen3moe": _qwen3moe, "qwen3next": _hybrid, "qwen35moe": _hybrid, "qwen4exp": _qwen4exp,
    "gpt-oss": _gpt_oss, "glm4moe": _glm4moe, "deepseek2": _deepseek2, "gemma4": _gemma4,
    "deepseek4": _deepseek4,
}  # fmt: skip
_TOP = {"qwen4exp": _qwen4exp_top, "gemma4": _gemma4_top, "deepseek4": _deepseek4_top}
