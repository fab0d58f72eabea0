"""config.json as it was published, with what saving again loses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mobile_gguf.convert.hf.checkpoint import _is_mtp
from mobile_gguf.convert.hf.upstream_child import _explain
from mobile_gguf.convert.hf.upstream_config import ConversionError, PublishedConfig, require_gating


def read(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    pytest.importorskip("transformers")
    (folder / "config.json").write_text(json.dumps(config))
    return PublishedConfig.from_pretrained(folder).to_dict()


def test_what_is_published_stays_as_it_is(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": None, "own": 1}
    values = read(tmp_path, config)
    assert {key: values[key] for key in config} == config
    assert values["num_experts_per_tok"] == 8, "a default of the family, which config.json does not mention"


def test_a_family_that_transformers_does_not_know(tmp_path: Path) -> None:
    assert read(tmp_path, {"model_type": "nobody_knows", "layers": 3}) == {
        "model_type": "nobody_knows",
        "layers": 3,
    }


def test_what_a_family_always_does_is_added_and_never_replaced(tmp_path: Path) -> None:
    config = {"model_type": "nobody_knows", "architectures": ["MiniMaxM2ForCausalLM"]}
    assert read(tmp_path, config)["scoring_func"] == "sigmoid"
    assert read(tmp_path, config | {"scoring_func": "softmax"})["scoring_func"] == "softmax"


def test_layers_that_were_renamed(tmp_path: Path) -> None:
    kinds = ["linear_attention", "indexed_attention"]
    config = {"model_type": "nobody_knows", "architectures": ["Qwen4ExpForCausalLM"], "layer_types": kinds}
    assert read(tmp_path, config)["layer_types"] == ["linear_attention", "full_attention"]
    other = config | {"architectures": ["OtherForCausalLM"]}
    assert read(tmp_path, other)["layer_types"] == kinds


def test_a_router_that_nobody_could_run_is_refused_with_the_keys() -> None:
    keys = {"minimax-m2.expert_count": 8}
    writer = SimpleNamespace(arch="minimax-m2", kv_data=[keys])
    with pytest.raises(ConversionError, match=r"scoring_func.*take config.json from where"):
        require_gating(writer, "MiniMaxM2ForCausalLM", Path("folder"))
    require_gating(
        SimpleNamespace(arch="minimax-m2", kv_data=[keys | {"minimax-m2.expert_gating_func": 2}]), "", Path()
    )
    require_gating(SimpleNamespace(arch="qwen3moe", kv_data=[{"qwen3moe.expert_count": 8}]), "", Path())


def test_an_assertion_without_words_says_its_line() -> None:
    with pytest.raises(AssertionError) as caught:
        assert not json.loads("[1]")
    caught.value.args = ()
    said = _explain(caught.value, {"folder": "ck"})
    assert "test_upstream_config.py" in said
    assert said.endswith('assert not json.loads("[1]")')


def test_a_missing_key_is_named() -> None:
    assert "config.json has no 'num_attention_groups'" in _explain(
        KeyError("num_attention_groups"), {"folder": "ck"}
    )


@pytest.mark.parametrize(
    ("name", "is_mtp"),
    [
        ("model.layers.47.mlp.gate.weight", False),
        ("model.layers.48.mlp.gate.weight", True),
        ("mtp.layers.0.mlp.gate.weight", True),
        ("model.mtp.fc.weight", True),
        ("model.layers.3.eh_proj.weight", True),
        ("vision_tower.layers.60.mlp.fc1.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_which_tensors_are_of_multi_token_prediction(name: str, is_mtp: bool) -> None:
    assert _is_mtp(name, 48) == is_mtp
