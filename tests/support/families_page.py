"""The table of docs/families.md that says what runs: made of what the tests expect of each family."""

from __future__ import annotations

from family_table import FAMILIES, Family

from mobile_gguf.wording import markdown_table

# what a family is called, and what is special
SHOWN = {
    "qwen3-next": "Qwen3-Next: delta-net layers, every 4th attends",
    "qwen3-next-no-mtp": "Qwen3-Next, saved without its MTP block",
    "qwen3.5-moe": "Qwen3.5, Qwen3.6: the same",
    "qwen3.5-moe-no-mtp": "Qwen3.5, saved without its MTP block",
    "qwen3.5-moe-vl": "Qwen3.5 with a vision tower",
    "qwen4-exp": "Qwen3.8: n-grams, sparse attention, hyper-connections",
    "qwen3-moe": "Qwen3-MoE",
    "qwen3-vl-moe": "Qwen3-VL-MoE, as published",
    "qwen3-vl-moe-resaved": "Qwen3-VL-MoE, as transformers 5 saves it",
    "qwen2-moe": "Qwen2-MoE",
    "deepseek-v2": "DeepSeek-V2: MLA",
    "deepseek-v3": "DeepSeek-V3: MLA, groups",
    "deepseek-v3.2": "DeepSeek-V3.2: MLA with an indexer",
    "deepseek-v4": "DeepSeek-V4: compressed keys, experts by token, FP4",
    "glm-4.5": "GLM-4.5 to 4.7",
    "glm-4.7-flash": "GLM-4.7-Flash: MLA",
    "glm-5": "GLM-5: MLA with an indexer",
    "step-3.7": "Step-3.7: windows, heads by layer",
    "gemma-4": "Gemma 4: windows, per-layer embeddings, shared keys",
    "gemma-4-plain": "Gemma 4 without per-layer embeddings",
    "gpt-oss": "gpt-oss: windows, sinks",
    "granite-4": "Granite 4: Mamba-2 layers",
    "granite-moe": "Granite-MoE",
    "granite-moe-shared": "Granite-MoE with a shared expert",
    "granite-moe-swa": "Granite-MoE with windows",
    "nemotron-3": "Nemotron-3: Mamba-2 layers, layers that are experts only",
    "nemotron-3-latent": "Nemotron-3 with latent experts",
    "lfm2-moe": "LFM2: convolutions",
    "ling-3": "Ling 3: KDA layers, MLA",
    "kimi-linear": "Kimi-Linear: KDA layers, MLA",
    "jamba": "Jamba: Mamba layers",
    "minimax-m2": "MiniMax-M2: sigmoid router",
    "llama-4": "Llama 4: one expert a token, every 2nd layer",
    "llama-4-every": "Llama 4 with two experts a token",
    "mixtral": "Mixtral",
    "mixtral-joined": "Mixtral, experts joined",
    "olmoe": "OLMoE",
    "ernie-4.5": "Ernie 4.5",
    "dots1": "dots.llm1",
    "laguna": "Laguna: windows, heads by layer",
    "afmoe": "Trinity (AFMoE)",
    "cohere2-moe": "Command (Cohere2-MoE)",
    "hunyuan-3": "Hunyuan 3",
    "solar-open": "Solar Open",
    "solar-open-joined": "Solar Open, experts joined",
    "mellum": "Mellum: windows",
}
_COLUMNS = ("family", "MTP", "modes", "segments", "held against Transformers")


def modes_table() -> str:
    """Markdown, in the order of ``SHOWN``."""
    rows = [(label, *_row(FAMILIES[name])) for name, label in SHOWN.items()]
    return "\n".join(markdown_table([_COLUMNS, *rows], left=range(len(_COLUMNS))))


def _row(family: Family) -> tuple[str, str, str, str]:
    if family.top_1:
        modes = "exact"
    elif family.hybrid:
        modes = "exact, little, big-little by the head"
    else:
        modes = "all"
    mtp = "left out" if family.mtp_left_out else "drafts" if family.mtp else ""
    segments = f"no ({family.no_segments})" if family.no_segments else "yes"
    return mtp, modes, segments, f"no: {family.unverified}" if family.unverified else "yes"
