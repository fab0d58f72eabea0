"""The demo model as a ``qwen2moe`` GGUF, with the names and keys llama.cpp's own converter gives."""

from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quantize

from mobile_gguf.progress import Progress

from . import recipe
from .recipe import Weight

NAME = "SmolLM2-135M-Instruct cut into experts (mobile-gguf demo)"
DESCRIPTION = (
    "A small dense model cut into 16 routed experts and a shared one per layer, so that Mixture-of-Experts "
    "features can be tried offline. Fluent, unreliable about facts, not a good chatbot."
)
SOURCE_URL = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"

_EXPERT_MATRICES = tuple(
    f"ffn_{matrix}_{kind}.weight" for matrix in ("gate", "up", "down") for kind in ("exps", "shexp")
)


def write_gguf(dense: Path, recipe_file: Path, path: Path, *, float32: bool, progress: Progress) -> None:
    """Write the Mixture of Experts made from the GGUF ``dense`` to ``path``.

    Experts, shared and routed, are Q8_0; attention and embedding keep the blocks they have in ``dense``;
    routers, norms, biases and the shared expert's gate are F32. With ``float32`` everything is F32.
    """
    source = GGUFReader(dense)
    writer = GGUFWriter(path, "qwen2moe")
    steps = recipe.N_LAYER + 1  # the last one is writing
    try:
        _add_metadata(writer, source, float32=float32)
        for name, weight in recipe.demo_weights(source, recipe_file):
            stored = Weight(weight.values()) if float32 else _stored(name, weight)
            writer.add_tensor(name, stored.data, raw_dtype=stored.type)
            if name.endswith("ffn_gate_inp_shexp.weight"):
                progress("grouping neurons into experts", (int(name.split(".")[1]) + 1) / steps)
        progress("writing the demo model", recipe.N_LAYER / steps)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    progress("demo model written", 1.0)


def _stored(name: str, weight: Weight) -> Weight:
    """Return the weight as the file has it."""
    if name.endswith(_EXPERT_MATRICES):
        return Weight(quantize(weight.data, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    return weight


def _add_metadata(writer: GGUFWriter, source: GGUFReader, *, float32: bool) -> None:
    writer.add_type("model")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_basename("smollm2-moe-demo")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "SmolLM2-135M-Instruct")
    writer.add_base_model_organization(0, "HuggingFaceTB")
    writer.add_base_model_repo_url(0, SOURCE_URL)
    writer.add_file_type(LlamaFileType.ALL_F32 if float32 else LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(source.fields["general.quantization_version"].contents())

    writer.add_block_count(recipe.N_LAYER)
    writer.add_context_length(source.fields["llama.context_length"].contents())
    writer.add_embedding_length(recipe.N_EMBD)
    writer.add_feed_forward_length(recipe.N_FF)
    writer.add_head_count(recipe.N_HEAD)
    writer.add_head_count_kv(recipe.N_HEAD_KV)
    writer.add_rope_freq_base(source.fields["llama.rope.freq_base"].contents())
    writer.add_layer_norm_rms_eps(recipe.RMS_NORM_EPS)
    writer.add_expert_count(recipe.N_EXPERT)
    writer.add_expert_used_count(recipe.N_EXPERT_USED)
    writer.add_expert_feed_forward_length(recipe.N_FF_EXPERT)
    writer.add_expert_shared_feed_forward_length(recipe.N_FF_SHARED)

    for key, field in source.fields.items():
        if key.startswith("tokenizer."):
            kind, *element = field.types
            writer.add_key_value(
                key, field.contents(), kind, element[-1] if kind == GGUFValueType.ARRAY else None
            )
