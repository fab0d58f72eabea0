"""The dimensions of models that people run, as their makers published them, and where each was read.

All are numbers of a config.json, under the names that llama.cpp gives them. ``source`` says where: "defaults"
are those of transformers 5.24, for the checkpoint that its own text names; a repository is one that quotes
the config.json whole or as a table; a log is that of a published GGUF. Parameter counts are those of the
model cards.
"""

from __future__ import annotations

from real_models import N_GRAM_ROWS, RealModel

_RMS = {"attention.layer_norm_rms_epsilon": 1e-6}
_DELTA_NET = _RMS | {
    "embedding_length": 2048, "attention.head_count": 16, "attention.head_count_kv": 2,
    "attention.key_length": 256, "attention.value_length": 256, "rope.dimension_count": 64,
    "ssm.conv_kernel": 4, "ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.group_count": 16,
    "ssm.time_step_rank": 32, "full_attention_interval": 4, "context_length": 262144,
    "expert_feed_forward_length": 512, "expert_shared_feed_forward_length": 512,
}  # fmt: skip
_GPT_OSS = {
    "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 201088, "context_length": 131072,
    "embedding_length": 2880, "attention.head_count": 64, "attention.head_count_kv": 8,
    "attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64,
    "attention.sliding_window": 128, "expert_used_count": 4, "expert_feed_forward_length": 2880,
    "feed_forward_length": 2880,
}  # fmt: skip
_WINDOWS = [True, True, True, True, True, False] * 5

REAL_MODELS = (
    RealModel(
        "Qwen3-30B-A3B", "qwen3moe", 30.5, 3.3,
        "qwen3_moe's defaults; 48 layers and 128 experts in THUDM/slime, scripts/models/qwen3-30B-A3B.sh",
        _RMS | {
            "block_count": 48, "context_length": 40960, "embedding_length": 2048, "vocab_size": 151936,
            "attention.head_count": 32, "attention.head_count_kv": 4, "attention.key_length": 128,
            "attention.value_length": 128, "feed_forward_length": 6144, "expert_count": 128,
            "expert_used_count": 8, "expert_feed_forward_length": 768,
        },
    ),
    RealModel(
        "Qwen3-Next-80B-A3B", "qwen3next", 80, 3,
        "qwen3_next's defaults; docker/model-runner, ai/qwen3-coder-next-vllm.md",
        _DELTA_NET | {
            "block_count": 48, "vocab_size": 151936, "feed_forward_length": 5120, "expert_count": 512,
            "expert_used_count": 10,
        },
    ),
    RealModel(
        "Qwen3.6-35B-A3B", "qwen35moe", 35, 3,
        "qwen3_5_moe's defaults; the model card's list of dimensions; one block for MTP in its config.json",
        _DELTA_NET | {
            "block_count": 41, "nextn_predict_layers": 1, "vocab_size": 248320, "expert_count": 256,
            "expert_used_count": 8, "feed_forward_length": 512,
            "rope.dimension_sections": [11, 11, 10, 0],
        },
    ),
    RealModel(
        "gpt-oss-20b", "gpt-oss", 21, 3.6, "openai/gpt-oss: gpt_oss's defaults with 24 layers and 32 experts",
        _GPT_OSS | {"block_count": 24, "expert_count": 32},
    ),
    RealModel(
        "gpt-oss-120b", "gpt-oss", 117, 5.1, "gpt_oss's defaults",
        _GPT_OSS | {"block_count": 36, "expert_count": 128},
    ),
    RealModel(
        "GLM-4.5-Air", "glm4moe", 106, 12,
        "glm4_moe's defaults; biases of queries, keys and values in THUDM/slime, "
        "scripts/models/glm4.5-106B-A12B.sh",
        {
            "attention.layer_norm_rms_epsilon": 1e-5, "block_count": 47, "nextn_predict_layers": 1,
            "context_length": 131072, "embedding_length": 4096, "vocab_size": 151552,
            "attention.head_count": 96, "attention.head_count_kv": 8, "attention.key_length": 128,
            "attention.value_length": 128, "rope.dimension_count": 64, "feed_forward_length": 10944,
            "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 1408,
            "expert_shared_count": 1, "leading_dense_block_count": 1,
        },
    ),
    RealModel(
        "GLM-4.7-Flash", "deepseek2", 30, 3,
        "glm4_moe_lite's defaults; the log of a published GGUF, which has no block for MTP",
        {
            "attention.layer_norm_rms_epsilon": 1e-5, "block_count": 47, "context_length": 202752,
            "embedding_length": 2048, "vocab_size": 154880, "attention.head_count": 20,
            "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
            "attention.key_length_mla": 256, "attention.value_length_mla": 256,
            "attention.q_lora_rank": 768, "attention.kv_lora_rank": 512, "rope.dimension_count": 64,
            "feed_forward_length": 10240, "expert_count": 64, "expert_used_count": 4,
            "expert_feed_forward_length": 1536, "expert_shared_count": 1, "leading_dense_block_count": 1,
        },
    ),
    RealModel(
        "Gemma-4-26B-A4B", "gemma4", 25.2, 3.8,
        "logs of published GGUFs (ggml-org/llama.cpp issues 21760, 22373); its text_config in tests of ports",
        _RMS | {
            "block_count": 30, "context_length": 262144, "embedding_length": 2816, "vocab_size": 262144,
            "attention.head_count": 16, "attention.head_count_kv": [8 if own else 2 for own in _WINDOWS],
            "attention.key_length": 512, "attention.value_length": 512, "attention.key_length_swa": 256,
            "attention.value_length_swa": 256, "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": _WINDOWS, "attention.shared_kv_layers": 0,
            "rope.dimension_count": 512, "rope.dimension_count_swa": 256, "feed_forward_length": 2112,
            "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 704,
            "embedding_length_per_layer_input": 0, "final_logit_softcapping": 30.0,
        },
        tied=True,
    ),
    RealModel(
        "DeepSeek-V4-Flash", "deepseek4", 284, 13,
        "deepseek_v4's defaults, named after it; compress_ratios, which those have otherwise, from copies of "
        "its config.json; without the block for MTP",
        _RMS | {
            "block_count": 43, "context_length": 1048576, "embedding_length": 4096, "vocab_size": 129280,
            "attention.head_count": 64, "attention.head_count_kv": 1, "attention.key_length": 512,
            "attention.value_length": 512, "attention.q_lora_rank": 1024, "rope.dimension_count": 64,
            "attention.sliding_window": 128, "attention.compress_ratios": [0, 0, *[4, 128] * 20, 4],
            "attention.compress_rope_freq_base": 160000.0, "attention.output_group_count": 8,
            "attention.output_lora_rank": 1024, "attention.indexer.head_count": 64,
            "attention.indexer.key_length": 128, "attention.indexer.top_k": 512, "hash_layer_count": 3,
            "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 20,
            "hyper_connection.epsilon": 1e-6, "expert_count": 256, "expert_used_count": 6,
            "expert_feed_forward_length": 2048, "expert_shared_count": 1, "expert_weights_scale": 1.5,
            "expert_weights_norm": True, "expert_gating_func": 4, "swiglu_clamp_exp": 10.0,
            "feed_forward_length": 2048,
        },
    ),
    RealModel(
        "Qwen3.8-Flash-Next", "qwen4exp", 125 + 51, 6,
        "its config.json in tests of ports; QwenLM/Qwen3.8-Flash-Next, README.md; rows of the n-gram table "
        "from Helldez/BigMoeOnEdge, pull request 172; the converter leaves the block for MTP out",
        _DELTA_NET | {
            "block_count": 48, "embedding_length": 2560, "vocab_size": 248320, "attention.head_count": 24,
            "ssm.inner_size": 6144, "ssm.time_step_rank": 48, "expert_count": 512, "expert_used_count": 10,
            "expert_feed_forward_length": 640, "expert_shared_feed_forward_length": 640,
            "feed_forward_length": 640, "rope.dimension_sections": [11, 11, 10, 0],
            "hyper_connection.count": 4, "hyper_connection.low_rank": 320,
            "attention.indexer.head_count": 4, "attention.indexer.key_length": 128,
            "attention.indexer.top_k": 2048, "attention.compress_ratios": [0, 0, 0, 4] * 12,
            "ple.layers": [1], "ple.ngram_size": 3, "ple.heads_per_ngram": 8, "ple.conv_kernel": 4,
            "ple.eos_token_id": 248044, "embedding_length_per_layer_input": 160,
            "ple.layer_multipliers": [1, 3, 5], "ple.head_offsets": [20_000_000 * i for i in range(16)],
            "ple.head_vocab_sizes": [20_000_000] * 16, N_GRAM_ROWS: 320_001_536,
        },
    ),
)  # fmt: skip
BY_NAME = {model.name: model for model in REAL_MODELS}
