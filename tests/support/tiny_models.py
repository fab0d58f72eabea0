"""Tiny random MoE models of many architectures: what they look like, and a cache of their GGUF files.

``path(name)`` builds everything that is missing in one worker process (``tiny_build``) and keeps it under
$MOBILE_GGUF_TEST_CACHE, or beside the engine's builds, under a key over all that decides the result. A
machine that cannot build them has them ready in $MOBILE_GGUF_TEST_MODELS, as "name.gguf".

``python tiny_models.py FOLDER NAME...`` makes such a folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import engine_libs
import numpy as np
import pytest

from mobile_gguf.files.lock import exclusive
from mobile_gguf.files.paths import engine_cache_dir

VOCAB = 320

# beside the engine's builds: looked up before any test moves the user's directories
CACHE = Path(os.environ.get("MOBILE_GGUF_TEST_CACHE") or engine_cache_dir() / "test-models")


@dataclass(frozen=True)
class TinyModel:
    """One GGUF: a Transformers config, and how it is converted.

    Four MoE layers at least, so that a store at 40% is neither the whole model nor the smallest budget.
    """

    name: str
    config_class: str
    model_class: str
    config: dict[str, Any]
    top_k: int
    n_layer_moe: int = 4
    n_expert: int = 16
    top_k_field: str = "num_experts_per_tok"
    architecture: str = ""  # the converter's name for it, where Transformers' differs
    outtype: str = "f32"
    quantize: str = ""  # tail of a LLAMA_FTYPE_MOSTLY_ name
    expert_scales: bool = False
    split_max_tensors: int = 0  # > 0: several files of that many tensors
    mxfp4: bool = False
    reference: bool = False  # Transformers' logits are kept beside the GGUF
    on_demand: bool = False  # built only when asked for by name
    seed: int = 1
    tolerance: float = 1e-4  # of logits of size 1 to 10, against Transformers

    @property
    def little_k(self) -> int:
        return self.top_k // 2


def _config(**own: Any) -> dict[str, Any]:
    common = {
        "vocab_size": VOCAB, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 2, "pad_token_id": VOCAB - 1,
    }  # fmt: skip
    return common | own


_MIXTRAL = _config(intermediate_size=112, num_local_experts=8, num_experts_per_tok=2)
_QWEN2 = _config(
    moe_intermediate_size=64, shared_expert_intermediate_size=96, intermediate_size=64,
    num_experts=16, num_experts_per_tok=4, norm_topk_prob=False,
)  # fmt: skip
_QWEN3 = _config(
    head_dim=32, moe_intermediate_size=80, intermediate_size=80,
    num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
)  # fmt: skip
# K-quants come in blocks of 256 values
_QWEN3_256 = _QWEN3 | {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 8}
_OLMOE = _config(
    intermediate_size=80, num_key_value_heads=4, num_experts=16, num_experts_per_tok=8, norm_topk_prob=False
)
# llama.cpp knows the Lite variant by its number of layers
_DEEPSEEK2 = _config(
    num_hidden_layers=26, num_key_value_heads=4, first_k_dense_replace=1, intermediate_size=128,
    hidden_size=64, moe_intermediate_size=24, n_routed_experts=16, n_shared_experts=2, num_experts_per_tok=6,
    kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    norm_topk_prob=False, routed_scaling_factor=1.5, topk_method="greedy", n_group=1, topk_group=1,
)  # fmt: skip
_DEEPSEEK3 = _config(
    num_hidden_layers=5, num_key_value_heads=4, first_k_dense_replace=1, intermediate_size=128,
    moe_intermediate_size=72, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
    kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    norm_topk_prob=True, routed_scaling_factor=2.5, n_group=4, topk_group=2, num_mtp_layers=0,
    num_nextn_predict_layers=0,
    scoring_func="sigmoid",
)  # fmt: skip
_GPT_OSS = _config(
    head_dim=32, intermediate_size=64, num_local_experts=8, num_experts_per_tok=4, sliding_window=128,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
_GRANITE = _config(
    intermediate_size=80, num_local_experts=8, num_experts_per_tok=4,
    embedding_multiplier=2.0, logits_scaling=1.5, residual_multiplier=0.5, attention_multiplier=0.2,
)  # fmt: skip
_GRANITE_SWA = _GRANITE | {"shared_intermediate_size": 96, "sliding_window": 128}
_GEMMA4 = _config(
    head_dim=16, global_head_dim=32, intermediate_size=96, hidden_size_per_layer_input=0, sliding_window=128,
    layer_types=["sliding_attention", "full_attention"] * 2, enable_moe_block=True, num_experts=8,
    top_k_experts=4, moe_intermediate_size=80, tie_word_embeddings=True, final_logit_softcapping=30.0,
)  # fmt: skip
_GLM4 = _config(
    num_hidden_layers=5, head_dim=32, first_k_dense_replace=1, intermediate_size=128,
    moe_intermediate_size=72, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
    routed_scaling_factor=1.5, n_group=1, topk_group=1, norm_topk_prob=True, use_qk_norm=True,
    num_mtp_layers=0, num_nextn_predict_layers=0,
)  # fmt: skip
_LLAMA4 = _config(
    head_dim=32, intermediate_size=80, intermediate_size_mlp=128, num_local_experts=8, num_experts_per_tok=2,
    interleave_moe_layer_step=1,
)  # fmt: skip
_PHIMOE = _config(
    intermediate_size=80, num_local_experts=8, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
    rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": 2048,
    },
)  # fmt: skip
_NEMOTRON_H = _config(
    layers_block_type=["moe", "mamba", "moe", "attention", "moe", "moe"], num_hidden_layers=6, head_dim=32,
    intermediate_size=80, ssm_state_size=16, mamba_num_heads=4, mamba_head_dim=48, n_groups=2, chunk_size=16,
    n_routed_experts=16, moe_intermediate_size=80, moe_shared_expert_intermediate_size=96,
    num_experts_per_tok=4, routed_scaling_factor=1.5, norm_topk_prob=True, use_mamba_kernels=False,
)  # fmt: skip

_BULKY = _QWEN3_256 | {
    "num_hidden_layers": 8, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 2,
}  # fmt: skip
_DENSE = _config(head_dim=32, intermediate_size=128)


def _qwen3(name: str, config: dict[str, Any] = _QWEN3, **own: Any) -> TinyModel:
    return TinyModel(name, "Qwen3MoeConfig", "Qwen3MoeForCausalLM", config, 4, **own)


def _gpt_oss(name: str, **own: Any) -> TinyModel:
    return TinyModel(name, "GptOssConfig", "GptOssForCausalLM", _GPT_OSS, 4, n_expert=8, **own)


MODELS: dict[str, TinyModel] = {
    m.name: m
    for m in [
        # every architecture in float32, where Transformers and llama.cpp can be compared
        TinyModel("mixtral", "MixtralConfig", "MixtralForCausalLM", _MIXTRAL, 2, n_expert=8, reference=True),
        TinyModel("qwen2moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", _QWEN2, 4, reference=True),
        _qwen3("qwen3moe", reference=True),
        TinyModel("olmoe", "OlmoeConfig", "OlmoeForCausalLM", _OLMOE, 8, reference=True),
        TinyModel("deepseek2", "DeepseekV2Config", "DeepseekV2ForCausalLM", _DEEPSEEK2, 6, n_layer_moe=25,
                  reference=True),
        TinyModel("deepseek3", "DeepseekV3Config", "DeepseekV3ForCausalLM", _DEEPSEEK3, 4, reference=True),
        _gpt_oss("gpt-oss", reference=True),
        TinyModel(
            "granitemoe", "GraniteMoeConfig", "GraniteMoeForCausalLM", _GRANITE, 4, n_expert=8, reference=True
        ),
        TinyModel("glm4moe", "Glm4MoeConfig", "Glm4MoeForCausalLM", _GLM4, 4, reference=True),
        TinyModel("llama4", "Llama4TextConfig", "Llama4ForCausalLM", _LLAMA4, 2, n_expert=8, reference=True),
        # no gate matrix; a hybrid, so its layers without a feed-forward network are not in the store
        TinyModel("nemotron-h", "NemotronHConfig", "NemotronHForCausalLM", _NEMOTRON_H, 4, reference=True,
                  tolerance=1e-2),
        # gate and up in one tensor; a scale per expert; both
        TinyModel(
            "granitemoe-swa", "GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM", _GRANITE_SWA, 4, n_expert=8,
            reference=True,
        ),
        _qwen3("qwen3moe-scales", expert_scales=True, reference=True),
        TinyModel(
            "gemma4", "Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA4, 4, n_expert=8,
            top_k_field="top_k_experts", reference=True,
            tolerance=1e-2,  # ggml rounds GELU's argument to half precision
        ),
        # llama.cpp's PhiMoE is not Transformers' (no sparse mixer): only for comparing builds
        TinyModel("phimoe-f16", "PhimoeConfig", "PhimoeForCausalLM", _PHIMOE, 2, n_expert=8, outtype="f16",
                  architecture="PhiMoEForCausalLM"),
        # the types that experts come in
        TinyModel("olmoe-bf16", "OlmoeConfig", "OlmoeForCausalLM", _OLMOE, 8, outtype="bf16"),
        TinyModel("qwen2moe-q8_0", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", _QWEN2, 4, outtype="q8_0"),
        _qwen3("qwen3moe-q4_k", config=_QWEN3_256, n_expert=8, quantize="Q4_K_M"),
        _qwen3("qwen3moe-q4_0", config=_QWEN3_256, n_expert=8, quantize="Q4_0"),
        _qwen3("qwen3moe-q5_0", config=_QWEN3_256 | {"moe_intermediate_size": 160}, n_expert=8,
               quantize="Q5_0"),
        _qwen3("qwen3moe-iq4_nl", config=_QWEN3_256, n_expert=8, quantize="IQ4_NL"),
        _gpt_oss("gpt-oss-mxfp4", mxfp4=True),
        # as large models are published: in several files
        TinyModel(
            "mixtral-split", "MixtralConfig", "MixtralForCausalLM", _MIXTRAL, 2, n_expert=8,
            outtype="f16", split_max_tensors=20,
        ),
        # experts that outweigh everything else in the process (200 MB), for memory limits
        TinyModel(
            "bulky", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", _BULKY, 2, n_layer_moe=8, n_expert=32,
            outtype="f16", on_demand=True,
        ),
        TinyModel("dense", "Qwen3Config", "Qwen3ForCausalLM", _DENSE, 0, n_layer_moe=0, n_expert=0),
    ]
}  # fmt: skip

REFERENCE_MODELS = [m.name for m in MODELS.values() if m.reference]


def _key(model: TinyModel) -> str:
    """A hash over the spec, the code that builds it and the versions of what it builds with."""
    source = engine_libs.source_tree()
    digest = hashlib.sha256(json.dumps(asdict(model) | {"tolerance": None}, sort_keys=True).encode())
    for path in (Path(__file__).with_name("tiny_build.py"), source / "conversion" / "base.py"):
        digest.update(path.read_bytes())
    for package in ("torch", "transformers"):
        digest.update(metadata.version(package).encode())
    return digest.hexdigest()[:16]


def _folder(model: TinyModel) -> Path:
    """Where a model's files lie: one .gguf (or its parts), and the reference logits."""
    return CACHE / f"{model.name}-{_key(model)}"


def _gguf(model: TinyModel) -> Path | None:
    """The GGUF, the first of its parts if there are several; None if it is not built."""
    return min(_folder(model).glob("*.gguf"), default=None)


def one_builder() -> AbstractContextManager[None]:
    """For who builds what is missing in the cache: the tests run in several processes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return exclusive(CACHE / ".lock")


def _build(models: list[TinyModel]) -> str:
    """Builds ``models`` in one process and returns its narration; what failed says so in an .error file."""
    CACHE.mkdir(parents=True, exist_ok=True)
    source = engine_libs.source_tree()
    entries = []
    for model in models:
        _error(model).unlink(missing_ok=True)
        spec = asdict(model) | {"reference_k": [model.top_k, model.little_k] if model.reference else []}
        entries.append({"spec": spec, "folder": str(_folder(model)), "error": str(_error(model))})
    # the converter and the gguf package it was released with come first
    python_path = [str(source), str(source / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    environment = engine_libs.child_environment(
        engine_libs.stock_lib(), PYTHONPATH=os.pathsep.join(filter(None, python_path)), HF_HUB_OFFLINE="1"
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tiny_build.py"))],
        input=json.dumps({"models": entries}), text=True, capture_output=True, env=environment, check=False,
    )  # fmt: skip
    for model in models:
        if _gguf(model) is None and not _error(model).exists():
            _error(model).write_text(done.stderr[-3000:])
    return done.stderr


def _error(model: TinyModel) -> Path:
    return _folder(model).with_suffix(".error")


@cache
def path(name: str) -> Path:
    """The GGUF of a tiny model; skips where torch or Transformers is missing, fails if it cannot be built."""
    if ready := os.environ.get("MOBILE_GGUF_TEST_MODELS"):
        return Path(ready) / f"{name}.gguf"
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'mobile-gguf[convert]'")
    model = MODELS[name]
    if _gguf(model) is None:
        with one_builder():
            wanted = [model] if model.on_demand else [m for m in MODELS.values() if not m.on_demand]
            if missing := [m for m in wanted if _gguf(m) is None]:
                _build(missing)
    gguf = _gguf(model)
    if gguf is None:
        pytest.fail(f"the tiny model {name} was not built: {_error(model).read_text()}")
    return gguf


def reference(name: str) -> dict[str, np.ndarray]:
    """Transformers' logits: tokens [n], and k<K> [n, n_vocab] for all experts and for half of them."""
    with np.load(path(name).with_name("reference.npz")) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        shutil.copy2(path(wanted), Path(sys.argv[1]) / f"{wanted}.gguf")
