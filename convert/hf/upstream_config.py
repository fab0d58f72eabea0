"""A checkpoint's config.json for the pinned converter: as it was published, whatever transformers is there.

The converter is made for an older transformers, which did not know the newest families, so that their
config.json came through as it is. The installed one knows them, and renames or drops what the converter asks
for. What a config leaves to transformers' defaults is added; what stands in it is never replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What a family always does, and says in config.json only where its makers wrote that: transformers, saving a
# checkpoint again, leaves it out.
_CERTAIN: dict[str, dict[str, Any]] = {
    "MiniMaxM2ForCausalLM": {"scoring_func": "sigmoid", "use_qk_norm": True},
    "Dots1ForCausalLM": {"scoring_func": "sigmoid"},
    "Glm4MoeLiteForCausalLM": {"scoring_func": "sigmoid"},
    "DeepseekV3ForCausalLM": {"scoring_func": "sigmoid"},
    "DeepseekV32ForCausalLM": {"scoring_func": "sigmoid"},
    "AfmoeForCausalLM": {"route_norm": True},
    "ExaoneMoeForCausalLM": {"scoring_func": "sigmoid"},
    "MiMoV2FlashForCausalLM": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "KimiLinearForCausalLM": {"moe_router_activation_func": "sigmoid"},
}
# What transformers calls otherwise when it saves again
_RENAMED = {"Qwen4ExpForCausalLM": {"indexed_attention": "full_attention"}}
# llama.cpp loads no file of these, or ends the process, where it does not say how its router scores experts
_GATED = frozenset(
    {
        "bailingmoe2", "bailingmoe3", "deepseek32", "deepseek4", "dots1", "dots3note", "exaone-moe",
        "kimi-k3", "kimi-linear", "lfm2moe", "minimax-m2", "minimax-m3", "smallthinker",
    }
)  # fmt: skip
_GATING_KEYS = "scoring_func, score_function or moe_router_activation_func"


class ConversionError(Exception):
    """What is wrong with the checkpoint, for the user."""


class PublishedConfig:
    """Stands in for transformers' AutoConfig in the converter."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @classmethod
    def from_pretrained(cls, folder: Any, **_options: Any) -> PublishedConfig:
        import transformers

        try:
            known = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            defaults: dict[str, Any] = known.to_dict()
        except Exception:  # a family that the installed transformers does not know, or not in this form
            defaults = {}
        values = _with_defaults(_read_json(Path(folder) / "config.json"), defaults)
        text = values.get("text_config")
        part: dict[str, Any] = text if isinstance(text, dict) else values
        for architecture in values.get("architectures") or ():
            for key, value in _CERTAIN.get(architecture, {}).items():
                part.setdefault(key, value)
            names, kinds = _RENAMED.get(architecture), part.get("layer_types")
            if names and isinstance(kinds, list):
                part["layer_types"] = [names.get(str(kind), kind) for kind in kinds]
        return cls(values)

    def to_dict(self) -> dict[str, Any]:
        return self.values


def read_as_published(conversion: Any) -> None:
    """Make the converter read config.json as it is, and take tokenizer_config.json at its word."""
    conversion.base.AutoConfig = PublishedConfig
    _keep_add_bos_token()


def require_gating(writer: Any, architecture: str, folder: Path) -> None:
    """Raise ConversionError for a file that llama.cpp would not survive: its experts' scoring is missing."""
    written = {key for part in writer.kv_data for key in part}
    is_moe = f"{writer.arch}.expert_count" in written
    if writer.arch in _GATED and is_moe and f"{writer.arch}.expert_gating_func" not in written:
        raise ConversionError(
            f"{folder}: config.json does not say how the router of {architecture} scores experts"
            f" ({_GATING_KEYS}): take config.json from where the model was published"
        )


def _with_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The config, and what it does not mention at all; in parts of it alike.

    A null is an answer: DeepSeek-V2-Lite has no ``q_lora_rank``.
    """
    merged = dict(config)
    for key, value in defaults.items():
        if key not in config:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(config[key], dict):
            merged[key] = _with_defaults(config[key], value)
    return merged


def _keep_add_bos_token() -> None:
    """transformers 5 forgets ``add_bos_token`` beside a tokenizer.json, and the converter asks for it."""
    import transformers

    auto: Any = transformers.AutoTokenizer
    original = auto.from_pretrained.__func__

    def from_pretrained(cls: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        tokenizer = original(cls, folder, *args, **kwargs)
        path = Path(folder) / "tokenizer_config.json"
        wanted = _read_json(path).get("add_bos_token") if path.is_file() else None
        if wanted is True and getattr(tokenizer, "add_bos_token", None) is False:
            # the flag alone: how text is split stays as tokenizer.json has it
            object.__setattr__(tokenizer, "_add_bos_token", True)
        return tokenizer

    auto.from_pretrained = classmethod(from_pretrained)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
