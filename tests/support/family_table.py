"""The families that people run now, as tiny as they can be.

Sizes are the smallest at which every special part is there: two experts' worth of routing, recurrent and
attending layers, indexers, blocks for multi-token prediction (MTP).
"""

from __future__ import annotations

from typing import Any

from family import N_TOKENS, ROPE, VOCAB, Family, config
from family_more import MORE

__all__ = ["FAMILIES", "N_TOKENS", "VOCAB", "Family"]

_MLA = {
    "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "num_hidden_layers": 5,
}  # fmt: skip
_DEEPSEEK = {
    "first_k_dense_replace": 1, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_INDEXER = {
    "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 2,
    "mlp_layer_types": ["dense"] + ["sparse"] * 4,
}  # fmt: skip
_DELTA_NET = {
    "num_hidden_layers": 8, "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4,
}  # fmt: skip
_MROPE = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2,
        1, 1],
        "mrope_interleaved": True,
    }
}  # fmt: skip
_N_GRAMS = {
    "hc_count": 2, "hc_lowrank": 16, "ple_layer_ids": [2], "ple_embed_dim": 64, "ngram_vocab_size_base": 500,
    "make_ngram_vocab_size_divisible_by": 8, "heads_per_ngram": 2, "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 2048, "indexer_compress_ratio": 4,
}  # fmt: skip
_GEMMA4 = {
    "num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "intermediate_size": 96,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 3, "enable_moe_block": True, "num_experts": 8,
    "top_k_experts": 4, "moe_intermediate_size": 32, "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 16, "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": N_TOKENS, "num_kv_shared_layers": 2,
    # the converter cuts the embedding to the tokenizer's words
    "vocab_size": N_TOKENS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
_KDA = {
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_token": 4,
    "num_shared_experts": 1, "linear_head_dim": 32, "linear_num_heads": 4,
}  # fmt: skip
_STEP: dict[str, Any] = {
    "num_hidden_layers": 5, "head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 32,
    "share_expert_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 4, "sliding_window": 128,
    "mlp_layer_types": ["dense"] + ["sparse"] * 4,
    "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    "rope_parameters": {
        "full_attention": ROPE | {"partial_rotary_factor": 0.5}, "sliding_attention": ROPE,
    },
}  # fmt: skip
_GRANITE = {
    "num_hidden_layers": 6, "intermediate_size": 32, "shared_intermediate_size": 64, "num_local_experts": 8,
    "num_experts_per_tok": 4, "embedding_multiplier": 2.0, "logits_scaling": 1.5, "residual_multiplier": 0.5,
    "attention_multiplier": 0.2, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 16,
    "mamba_d_head": 32,
    "mamba_expand": 2, "mamba_chunk_size": 16, "position_embedding_type": "nope",
}  # fmt: skip
_NEMOTRON = {
    "layers_block_type": ["moe", "mamba", "moe", "attention", "moe", "moe"], "num_hidden_layers": 6,
    "head_dim": 32,
    "intermediate_size": 64, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
    "chunk_size": 16, "n_routed_experts": 8, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.5,
    "norm_topk_prob": True, "use_mamba_kernels": False,
}  # fmt: skip
_LFM2 = {
    "num_hidden_layers": 6, "intermediate_size": 96, "moe_intermediate_size": 32, "num_dense_layers": 1,
    "num_experts": 8, "num_experts_per_tok": 4, "tie_word_embeddings": True,
    "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
}  # fmt: skip
_LAYERS_OF_GRANITE = ["mamba", "mamba", "attention"] * 2
_NEXT, _NEXT_MODEL = "Qwen3NextConfig", "Qwen3NextForCausalLM"
_ONE_MTP = {"num_nextn_predict_layers": 1}

FAMILIES: dict[str, Family] = {
    "qwen3-next": Family(
        _NEXT, _NEXT_MODEL, config(_DELTA_NET, intermediate_size=64), 8, 8, "qwen", hybrid=True
    ),
    # as every fine-tune that transformers saved: the MTP blocks are gone
    "qwen3-next-no-mtp": Family(
        _NEXT, _NEXT_MODEL, config(_DELTA_NET, intermediate_size=64), 8, 8, hybrid=True
    ),
    "qwen3.5-moe": Family(
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", config(_DELTA_NET, _MROPE), 8, 8, "qwen",
        {"mtp_num_hidden_layers": 1}, hybrid=True,
    ),
    "qwen3.5-moe-no-mtp": Family(
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", config(_DELTA_NET, _MROPE), 8, 8, "",
        {"mtp_num_hidden_layers": 1}, hybrid=True,
    ),
    "qwen4-exp": Family(
        "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM", config(_DELTA_NET, _N_GRAMS), 8, 8, "",
        {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
        hybrid=True, unverified="runs differ",
    ),
    "deepseek-v3.2": Family(
        "DeepseekV32Config", "DeepseekV32ForCausalLM",
        config(_MLA, _DEEPSEEK, _INDEXER, scoring_func="sigmoid"), 5, 4, "deepseek", _ONE_MTP,
    ),
    "glm-5": Family(
        "GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", config(_MLA, _DEEPSEEK, _INDEXER), 5, 4, "deepseek",
        _ONE_MTP
    ),
    "glm-4.7-flash": Family(
        "Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM",
        config(_MLA, _DEEPSEEK, mlp_layer_types=["dense"] + ["sparse"] * 4), 5, 4, "deepseek",
        _ONE_MTP | {"first_k_dense_replace": 1},
    ),
    "glm-4.5": Family(
        "Glm4MoeConfig", "Glm4MoeForCausalLM",
        config(_DEEPSEEK, num_hidden_layers=5, head_dim=32, use_qk_norm=True), 5, 4, "deepseek", _ONE_MTP,
    ),
    "step-3.7": Family(
        "Step3p7Config", "Step3p7ForConditionalGeneration",
        {
            "text_config": config(_STEP),
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "max_position_embeddings": 4,
            },
        },
        5, 4, "step",
        text=_ONE_MTP | {
            "num_attention_groups": 2, "moe_num_experts": 8, "moe_top_k": 4, "moe_layers_enum": "1,2,3,4",
            "partial_rotary_factors": [0.5, 1.0, 0.5, 1.0, 0.5, 0.5], "rope_theta": 10000.0,
            "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
            "norm_expert_weight": True,
            "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"] * 2,
        },
    ),
    "gemma-4": Family(
        "Gemma4TextConfig", "Gemma4ForCausalLM", config(_GEMMA4), 6, 6, no_segments="biases or scales"
    ),
    "granite-4": Family(
        "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM",
        config(_GRANITE, layer_types=_LAYERS_OF_GRANITE), 6, 6, "", {"layer_types": _LAYERS_OF_GRANITE},
        hybrid=True,
    ),
    "nemotron-3": Family(
        "NemotronHConfig", "NemotronHForCausalLM", config(_NEMOTRON), 6, 4, "nemotron",
        _ONE_MTP | {"time_step_min": 0.0}, hybrid=True,
    ),
    "lfm2-moe": Family("Lfm2MoeConfig", "Lfm2MoeForCausalLM", config(_LFM2), 6, 5, hybrid=True),
    "ling-3": Family(
        "BailingHybridConfig", "BailingHybridForCausalLM",
        config(
            _MLA, _KDA, num_hidden_layers=6, layer_group_size=3, first_k_dense_replace=1,
            mlp_layer_types=["dense"] + ["sparse"] * 5, num_expert_group=2, topk_group=1,
            layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        ),
        6, 5, "",
        {
            "architectures": ["BailingMoeV3ForCausalLM"], "no_kda_lora": True, "kda_safe_gate": True,
            "gated_attention_proj_granularity_type": "head_wise", "moe_shared_expert_intermediate_size": 32,
            "norm_topk_prob": True, "num_nextn_predict_layers": 0, "short_conv_kernel_size": 4,
            "head_dim": 32,
            "n_group": 2, "num_experts_per_tok": 4, "score_function": "sigmoid", "kda_lower_bound": -5.0,
        }, hybrid=True,
    ),
    # saved again by transformers, without the key that says how its router scores
    "minimax-m2": Family(
        "MiniMaxM2Config", "MiniMaxM2ForCausalLM",
        config(head_dim=32, intermediate_size=32, num_local_experts=8, num_experts_per_tok=4), 4, 4, "",
        {"rotary_dim": 16},
    ),
    "llama-4": Family(
        "Llama4TextConfig", "Llama4ForCausalLM",
        config(
            num_hidden_layers=4, head_dim=32, intermediate_size=32, intermediate_size_mlp=96,
            num_local_experts=8,
            num_experts_per_tok=1, interleave_moe_layer_step=2,
        ),
        4, 2, top_1=True,
    ),
    **MORE,
}  # fmt: skip
