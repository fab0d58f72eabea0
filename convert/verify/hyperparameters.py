"""A GGUF's numbers held against its checkpoint's config.json: what short prompts cannot show.

A window of 4096 tokens, a rope base or a ratio of compression that is lost changes nothing in 24 tokens and
everything in 24,000. Compared is what both sides state and what has one meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mobile_gguf.gguf.info import GgufInfo

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_FULL = ("full_attention", "attention")
_LINEAR = ("linear_attention", "mamba", "conv")
_SLIDING = "sliding_attention"
# config.json's names, the GGUF's; numbers that are the same on both sides
_SAME = (
    (("num_attention_heads",), "attention.head_count"),
    (("hidden_size",), "embedding_length"),
    (("sliding_window",), "attention.sliding_window"),
    (("rope_theta",), "rope.freq_base"),
    (("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts"), "expert_used_count"),
    (("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), "expert_count"),
    (("index_topk", "indexer_budget"), "attention.indexer.top_k"),
    (("n_group", "num_expert_group"), "expert_group_count"),
    (("topk_group",), "expert_group_used_count"),
    (("routed_scaling_factor",), "expert_weights_scale"),
)
_GATING = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}


def differences(info: GgufInfo, config: Mapping[str, Any]) -> list[str]:
    """What the file says otherwise than config.json, a line each; empty if nothing differs."""
    part = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), Mapping)), config)
    return [*_numbers(info, part), *_layers(info, part), *_gating(info, part), *_ratios(info, part)]


def _value(info: GgufInfo, name: str) -> Any:
    return info.metadata.get(f"{info.architecture}.{name}")


def _numbers(info: GgufInfo, config: Mapping[str, Any]) -> Iterable[str]:
    for names, key in _SAME:
        stated = next((config[name] for name in names if _is_number(config.get(name))), None)
        written = _value(info, key)
        if stated is None or not _is_number(written):
            continue
        if abs(written - stated) > 1e-5 * abs(stated):
            name = next(name for name in names if _is_number(config.get(name)))
            yield f"{key} is {written:g}{_though(f'{name} {stated:g}')}"


def _layers(info: GgufInfo, config: Mapping[str, Any]) -> Iterable[str]:
    """Which layers attend to all, to a window, or keep a state."""
    types = config.get("layer_types")
    if not isinstance(types, Sequence) or isinstance(types, str):
        return
    types = list(types)[: info.n_layer]
    pattern = _value(info, "attention.sliding_window_pattern")
    if isinstance(pattern, list) and _SLIDING in types:
        for i, (kind, has_window) in enumerate(zip(types, pattern, strict=False)):
            if (kind == _SLIDING) != bool(has_window):
                yield f"layer {i} has {'a' if has_window else 'no'} sliding window{_though(kind)}"
                return
    if not any(kind in _LINEAR for kind in types):
        return
    heads = _value(info, "attention.head_count_kv")
    interval = _value(info, "full_attention_interval")
    for i, kind in enumerate(types):
        if isinstance(heads, list) and i < len(heads) and (kind in _FULL) != (heads[i] > 0):
            yield f"layer {i} has {heads[i]} heads for keys{_though(kind)}"
            return
        if isinstance(interval, int) and interval and (kind in _LINEAR) != bool((i + 1) % interval):
            yield f"full_attention_interval is {interval}{_though(f'{kind} of layer {i}')}"
            return


def _though(stated: object) -> str:
    return f", and config.json says {stated}"


def _gating(info: GgufInfo, config: Mapping[str, Any]) -> Iterable[str]:
    stated = (
        config.get("scoring_func") or config.get("moe_router_activation_func") or config.get("score_function")
    )
    written = _value(info, "expert_gating_func")
    if stated in _GATING and isinstance(written, int) and written != _GATING[stated]:
        yield f"expert_gating_func is {written}{_though(stated)}"


def _ratios(info: GgufInfo, config: Mapping[str, Any]) -> Iterable[str]:
    """Ratios of compression, which switch sparse attention on."""
    written = _value(info, "attention.compress_ratios")
    if not isinstance(written, list):
        return
    stated = config.get("compress_ratios")
    if isinstance(stated, list):
        if written[: info.n_layer] != stated[: info.n_layer]:
            yield f"attention.compress_ratios are {written}{_though(stated)}"
    elif isinstance(ratio := config.get("indexer_compress_ratio"), int) and ratio not in written:
        yield f"attention.compress_ratios are {written}{_though(f'indexer_compress_ratio {ratio}')}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
