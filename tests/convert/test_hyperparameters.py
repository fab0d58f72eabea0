"""Numbers that short prompts cannot show, held against config.json."""

from dataclasses import replace
from typing import Any

import pytest
from fake_backend import fake_info

from mobile_gguf.convert.verify.hyperparameters import differences

_LINEAR, _FULL, _SLIDING = "linear_attention", "full_attention", "sliding_attention"
METADATA = {
    "attention.sliding_window": 4096,
    "attention.sliding_window_pattern": [True, True, True, False],
    "rope.freq_base": 1e6,
    "expert_gating_func": 2,
    "expert_used_count": 8,
    "attention.compress_ratios": [0, 0, 0, 4],
}
CONFIG = {
    "sliding_window": 4096,
    "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL],
    "rope_theta": 1000000,
    "scoring_func": "sigmoid",
    "num_experts_per_tok": 8,
    "indexer_compress_ratio": 4,
}


def found(config: dict[str, Any], **metadata: Any) -> list[str]:
    values = {f"fakemoe.{key}": value for key, value in (METADATA | metadata).items()}
    return differences(replace(fake_info(), metadata=values), config)


def test_what_agrees() -> None:
    assert found(CONFIG) == []
    assert found({"text_config": CONFIG}) == []
    assert found({}) == [], "what config.json does not say is not compared"
    assert differences(fake_info(), CONFIG) == [], "nor what the file does not"


@pytest.mark.parametrize(
    ("change", "written", "stated"),
    [
        ({"sliding_window": 512}, "attention.sliding_window is 4096", "sliding_window 512"),
        ({"rope_theta": 10000.0}, "rope.freq_base is 1e+06", "rope_theta 10000"),
        ({"scoring_func": "softmax"}, "expert_gating_func is 2", "softmax"),
        ({"layer_types": [_FULL] + [_SLIDING] * 3}, "layer 0 has a sliding window", "full_attention"),
        ({"num_experts_per_tok": 4}, "expert_used_count is 8", "num_experts_per_tok 4"),
        ({"compress_ratios": [0] * 4}, "attention.compress_ratios are [0, 0, 0, 4]", "[0, 0, 0, 0]"),
    ],
)
def test_what_does_not(change: dict[str, Any], written: str, stated: str) -> None:
    assert found(CONFIG | change) == [f"{written}, and config.json says {stated}"]


def test_a_sparse_attention_that_was_lost() -> None:
    """What transformers 5 made of Qwen3.8's layers: no error, and a file without it."""
    (said,) = found(CONFIG, **{"attention.compress_ratios": [0, 0, 0, 0]})
    assert said == "attention.compress_ratios are [0, 0, 0, 0], and config.json says indexer_compress_ratio 4"


@pytest.mark.parametrize(
    "metadata", [{"full_attention_interval": 2}, {"attention.head_count_kv": [0, 2, 0, 2]}]
)
def test_which_layers_keep_a_state(metadata: dict[str, Any]) -> None:
    own = {"attention.sliding_window_pattern": None} | metadata
    assert found(CONFIG | {"layer_types": [_LINEAR, _FULL] * 2}, **own) == []
    (said,) = found(CONFIG | {"layer_types": [_LINEAR] * 3 + [_FULL]}, **own)
    assert said.endswith(
        ("config.json says linear_attention of layer 1", "config.json says linear_attention")
    )
