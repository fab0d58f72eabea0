"""The demo model as a Hugging Face checkpoint, for Transformers and for converters: no torch needed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType

from mobile_gguf.errors import MobileError, install_hint
from mobile_gguf.files.atomic import complete_or_absent, disk_errors
from mobile_gguf.progress import Progress, no_progress, scaled

from . import recipe
from .source import RECIPE, ensure_source

_MODEL_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def write_hf_checkpoint(directory: Path, *, progress: Progress | None = None) -> None:
    """Write config, safetensors and tokenizer files into ``directory``; see the package for the contract."""
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise MobileError(
            f"writing a Hugging Face checkpoint needs safetensors: {install_hint('convert')}"
        ) from error
    report = progress or no_progress
    source = GGUFReader(ensure_source(progress=scaled(report, 0.0, 0.5)))
    facts = {name: field.contents() for name, field in source.fields.items()}
    report("grouping neurons into experts", 0.5)
    tensors: dict[str, np.ndarray] = {}
    for name, weight in recipe.demo_weights(source, RECIPE):
        tensors.update(_hugging_face_tensors(name, weight.values()))
    report("writing the checkpoint", 0.8)
    with complete_or_absent(directory / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    with disk_errors(directory):
        for file, content in {"config.json": _config(facts), **_tokenizer_files(facts)}.items():
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (directory / file).write_text(text + "\n", encoding="utf-8")
    report("checkpoint written", 1.0)


def _hugging_face_tensors(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a GGUF tensor under its Hugging Face names; a stack of experts becomes one tensor per expert."""
    *block, module, kind = name.split(".")
    if not block:
        yield f"{_MODEL_MODULES[module]}.{kind}", values
        return
    prefix = f"model.layers.{block[1]}.{_LAYER_MODULES[module]}.{kind}"
    if module.endswith("_exps"):
        for expert, matrix in enumerate(values):
            yield prefix.format(expert=expert), np.ascontiguousarray(matrix)
    else:
        yield prefix, values


def _config(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "dtype": "float32",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "max_position_embeddings": facts["llama.context_length"],
        "rope_theta": facts["llama.rope.freq_base"],
        "rms_norm_eps": recipe.RMS_NORM_EPS,
        "hidden_act": "silu",
        "hidden_size": recipe.N_EMBD,
        "intermediate_size": recipe.N_FF,
        "num_hidden_layers": recipe.N_LAYER,
        "num_attention_heads": recipe.N_HEAD,
        "num_key_value_heads": recipe.N_HEAD_KV,
        "qkv_bias": True,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": recipe.N_EXPERT,
        "num_experts_per_tok": recipe.N_EXPERT_USED,
        "norm_topk_prob": False,
        "moe_intermediate_size": recipe.N_FF_EXPERT,
        "shared_expert_intermediate_size": recipe.N_FF_SHARED,
        "tie_word_embeddings": False,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_files(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return tokenizer.json and tokenizer_config.json: byte-level BPE, digits split one by one, no bos."""
    tokens = facts["tokenizer.ggml.tokens"]
    control = [
        token_id
        for token_id, kind in enumerate(facts["tokenizer.ggml.token_type"])
        if kind == TokenType.CONTROL
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": tokens[token_id], **flags, "special": True} for token_id in control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": facts["tokenizer.ggml.merges"],
        },
    }

    def token(key: str) -> str:
        return tokens[facts[f"tokenizer.ggml.{key}_token_id"]]

    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": facts["llama.context_length"],
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "pad_token": token("padding"),
            "unk_token": token("unknown"),
            "chat_template": facts["tokenizer.chat_template"],
        },
    }
