"""More families, as ``family_table`` has them: those that have been there for longer, or are rarer."""

from __future__ import annotations

from typing import Any

from family import N_TOKENS, ROPE, Family, config

_MLA: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
# one dense layer, then experts
_SHARED: dict[str, Any] = {
    "num_hidden_layers": 5, "first_k_dense_replace": 1, "intermediate_size": 128, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_EIGHT: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 4}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 4}
_QWEN: dict[str, Any] = _EIGHT | {"moe_intermediate_size": 32, "intermediate_size": 64}
_VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
    "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
}  # fmt: skip
_IMAGES: dict[str, Any] = {
    "image_token_id": 256,
    "video_token_id": 257,
    "vision_start_token_id": 258,
    "vision_end_token_id": 259,
}
_GRANITE: dict[str, Any] = _LOCAL | {
    "intermediate_size": 32, "embedding_multiplier": 2.0, "logits_scaling": 1.5, "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}  # fmt: skip
_WINDOWS = ["sliding_attention", "full_attention"]
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_GEMMA4: dict[str, Any] = _SPECIAL | {
    "head_dim": 16, "global_head_dim": 32, "intermediate_size": 96, "sliding_window": 128,
    "layer_types": _WINDOWS * 2, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 4,
    "moe_intermediate_size": 32, "tie_word_embeddings": True, "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0, "vocab_size": N_TOKENS,
}  # fmt: skip
_V4 = ["compressed_sparse_attention", "heavily_compressed_attention"]
_SCALED = "biases or scales"
# where a checkpoint does not say how much is rotated, the converter takes half and transformers all
_SOLAR: dict[str, Any] = config(
    _SHARED, head_dim=32, first_k_dense_replace=0, rope_parameters=ROPE | {"partial_rotary_factor": 1.0}
)

_QWEN3_VL: dict[str, Any] = _IMAGES | {
    "text_config": config(
        _QWEN, head_dim=32, norm_topk_prob=True, moe_intermediate_size=48,
        rope_scaling={"mrope_section": [8, 4, 4], "rope_type": "default", "mrope_interleaved": True},
    ),
    "vision_config": _VISION | {"deepstack_visual_indexes": [0, 1, 2]},
}  # fmt: skip

MORE: dict[str, Family] = {
    "mixtral": Family(
        "MixtralConfig", "MixtralForCausalLM",
        config(intermediate_size=64, num_local_experts=8, num_experts_per_tok=2), 4, 4,
    ),
    "qwen2-moe": Family(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        config(_QWEN, shared_expert_intermediate_size=64, norm_topk_prob=False), 4, 4,
    ),
    "qwen3-moe": Family(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", config(_QWEN, head_dim=32, norm_topk_prob=True), 4, 4
    ),
    "qwen3-vl-moe": Family(
        "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration",
        _QWEN3_VL,
        4, 4, made="experts_by_input",
    ),
    # as transformers 5 saves it: the experts stand the other way round
    "qwen3-vl-moe-resaved": Family(
        "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", _QWEN3_VL, 4, 4
    ),
    "olmoe": Family(
        "OlmoeConfig", "OlmoeForCausalLM",
        config(_EIGHT, intermediate_size=32, num_key_value_heads=4, norm_topk_prob=False), 4, 4,
    ),
    "deepseek-v2": Family(
        "DeepseekV2Config", "DeepseekV2ForCausalLM",
        config(_MLA, _SHARED, n_shared_experts=2, norm_topk_prob=False, topk_method="greedy"), 5, 4,
    ),
    "deepseek-v3": Family(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", config(_MLA, _SHARED, n_group=4, topk_group=2), 5, 4,
        "deepseek", {"num_nextn_predict_layers": 1, "scoring_func": "sigmoid"}, mtp_left_out=True,
    ),
    "deepseek-v4": Family(
        "DeepseekV4Config", "DeepseekV4ForCausalLM",
        config(
            num_hidden_layers=6, num_key_value_heads=1, head_dim=32, partial_rotary_factor=0.5,
            q_lora_rank=48, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1,
            num_experts_per_tok=4, routed_scaling_factor=1.5, layer_types=["sliding_attention"] * 2 + _V4 * 2,
            mlp_layer_types=["hash_moe"] * 3 + ["moe"] * 3, sliding_window=128, o_groups=2, o_lora_rank=32,
            index_n_heads=2, index_head_dim=128, index_topk=512, hc_mult=4, num_nextn_predict_layers=1,
        ),
        6, 6, "",
        {"num_hash_layers": 3, "compress_ratios": [0, 0, 4, 128, 4, 128], "num_nextn_predict_layers": 0},
        renamed=(
            (r"^model\.embed_tokens", "embed"), (r"^model\.hc_head\.hc_", "hc_head_"), (r"^model\.", ""),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
        ),
        made="experts_in_fp4", no_segments="possible numbers of segments: none", hybrid=True,
        unverified="Transformers cannot load it",
    ),
    "gpt-oss": Family(
        "GptOssConfig", "GptOssForCausalLM",
        config(_LOCAL, head_dim=32, intermediate_size=64, sliding_window=128, rope_parameters=ROPE), 4, 4,
        no_segments=_SCALED,
    ),
    "granite-moe": Family("GraniteMoeConfig", "GraniteMoeForCausalLM", config(_GRANITE), 4, 4),
    "granite-moe-shared": Family(
        "GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM",
        config(_GRANITE, shared_intermediate_size=64), 4, 4,
    ),
    "granite-moe-swa": Family(
        "GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM",
        config(_GRANITE, shared_intermediate_size=64, sliding_window=128), 4, 4,
    ),
    "nemotron-3-latent": Family(
        "NemotronHConfig", "NemotronHForCausalLM",
        config(
            layers_block_type=["moe", "mamba", "moe", "attention", "moe", "moe"], num_hidden_layers=6,
            head_dim=32, intermediate_size=64, ssm_state_size=16, mamba_num_heads=4, mamba_head_dim=32,
            n_groups=2, chunk_size=16, n_routed_experts=8, moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=64, num_experts_per_tok=4, routed_scaling_factor=1.5,
            norm_topk_prob=True, use_mamba_kernels=False, moe_latent_size=32,
        ),
        6, 4, "", {"time_step_min": 0.0}, hybrid=True,
    ),
    "jamba": Family(
        "JambaConfig", "JambaForCausalLM",
        config(
            num_hidden_layers=8, intermediate_size=64, num_experts=8, num_experts_per_tok=2,
            expert_layer_period=2, expert_layer_offset=1, attn_layer_period=4, attn_layer_offset=2,
            mamba_d_state=16, mamba_dt_rank=8, use_mamba_kernels=False,
        ),
        8, 4, hybrid=True,
    ),
    "kimi-linear": Family(
        "KimiLinearConfig", "KimiLinearForCausalLM",
        config(
            _MLA, q_lora_rank=None, num_hidden_layers=8, intermediate_size=96, moe_intermediate_size=32,
            num_experts=8, num_experts_per_token=4, num_shared_experts=1, linear_head_dim=32,
            linear_num_heads=4, linear_conv_kernel_dim=4,
            layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
            mlp_layer_types=["dense"] + ["sparse"] * 7,
        ),
        8, 7, "",
        {
            "linear_attn_config": {
                "full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7], "head_dim": 32, "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
            "first_k_dense_replace": 1, "moe_layer_freq": 1, "moe_router_activation_func": "sigmoid",
            "num_experts_per_token": 4,
        },
        renamed=((r"^(model\.layers\.0\.)block_sparse_moe\.", r"\1mlp."),), hybrid=True,
    ),
    "ernie-4.5": Family(
        "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM",
        config(
            intermediate_size=64, moe_intermediate_size=32, moe_k=4, moe_num_experts=8,
            moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=3,
        ),
        4, 3,
    ),
    "dots1": Family(
        "Dots1Config", "Dots1ForCausalLM", config(_SHARED, head_dim=32, num_key_value_heads=4), 5, 4
    ),
    "laguna": Family(
        "LagunaConfig", "LagunaForCausalLM",
        config(
            _EIGHT, num_hidden_layers=5, head_dim=32, intermediate_size=96, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, sliding_window=128,
            layer_types=["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"],
            mlp_layer_types=["dense"] + ["sparse"] * 4, num_attention_heads_per_layer=[4, 2, 2, 2, 4],
        ),
        5, 4,
    ),
    "gemma-4-plain": Family(
        "Gemma4TextConfig", "Gemma4ForCausalLM", config(_GEMMA4), 4, 4, no_segments=_SCALED
    ),
    "llama-4-every": Family(
        "Llama4TextConfig", "Llama4ForCausalLM",
        config(
            head_dim=32, intermediate_size=32, intermediate_size_mlp=96, num_local_experts=8,
            num_experts_per_tok=2, interleave_moe_layer_step=1,
        ),
        4, 4,
    ),
    "qwen3.5-moe-vl": Family(
        "Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration",
        _IMAGES | {
            "text_config": config(
                _QWEN, num_hidden_layers=4, head_dim=32, linear_key_head_dim=32, linear_value_head_dim=32,
                linear_num_key_heads=2, linear_num_value_heads=4, shared_expert_intermediate_size=32,
                rope_parameters=ROPE | {
                    "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                },
            ),
            "vision_config": _VISION | {"depth": 2},
        },
        4, 4, "qwen", text={"mtp_num_hidden_layers": 1}, hybrid=True,
    ),
    "afmoe": Family(
        "AfmoeConfig", "AfmoeForCausalLM",
        config(
            _EIGHT, num_hidden_layers=5, head_dim=32, intermediate_size=96, moe_intermediate_size=32,
            num_dense_layers=1, num_shared_experts=1, sliding_window=128, mup_enabled=True,
        ),
        5, 4,
    ),
    "cohere2-moe": Family(
        "Cohere2MoeConfig", "Cohere2MoeForCausalLM",
        config(_EIGHT, num_hidden_layers=5, head_dim=32, intermediate_size=32, sliding_window=128), 5, 5,
    ),
    "hunyuan-3": Family(
        "HYV3Config", "HYV3ForCausalLM",
        config(
            _EIGHT, num_hidden_layers=5, head_dim=32, intermediate_size=96, moe_intermediate_size=32,
            num_shared_experts=1,
        ),
        5, 4,
    ),
    "solar-open": Family("SolarOpenConfig", "SolarOpenForCausalLM", _SOLAR, 5, 5),
    # experts joined, where the converter reads them one by one
    "solar-open-joined": Family(
        "SolarOpenConfig", "SolarOpenForCausalLM", _SOLAR, 5, 5, made="experts_joined"
    ),
    "mixtral-joined": Family(
        "MixtralConfig", "MixtralForCausalLM",
        config(intermediate_size=64, num_local_experts=8, num_experts_per_tok=2), 4, 4,
        made="experts_joined",
    ),
    "mellum": Family(
        "MellumConfig", "MellumForCausalLM",
        config(
            _LOCAL, head_dim=32, intermediate_size=64, moe_intermediate_size=32, sliding_window=128,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
            # llama.cpp rotates both kinds of layers by one base
            rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE},
        ),
        4, 4,
    ),
}  # fmt: skip
