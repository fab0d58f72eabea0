"""Checkpoints whose config, tensors and tokenizer are not of one model: refused with their numbers, first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import convert_runs
import pytest
from safetensors.numpy import load_file, save_file

from mobile_gguf.convert.hf.consistency import check_consistent, text_config
from mobile_gguf.convert.hf.safetensors_header import SourceTensor
from mobile_gguf.convert.pipeline import convert_checkpoint
from mobile_gguf.errors import MobileError, ModelFormatError

CONFIG: dict[str, Any] = {
    "vocab_size": 8, "hidden_size": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    "num_hidden_layers": 2, "num_key_value_heads": None, "rms_norm_eps": 1e-6,
    "time_step_limit": [0.0, float("inf")],
}  # fmt: skip
N_EXPERT = 4


def tensor(name: str, *shape: int) -> SourceTensor:
    return SourceTensor(name, "F32", shape, Path("model.safetensors"), 0, 0)


GOOD = (
    tensor("model.embed_tokens.weight", 8, 4), tensor("lm_head.weight", 8, 4),
    tensor("model.layers.1.embed_tokens.weight", 9, 4), tensor("model.vision.embed_tokens.weight", 7, 3),
)  # fmt: skip


def check(
    folder: Path, tensors: Any = GOOD, architecture: str = "Qwen3MoeForCausalLM", **config: Any
) -> None:
    check_consistent(folder, CONFIG | config, architecture, N_EXPERT, tensors)


def refused(folder: Path, tensors: Any = GOOD, **config: Any) -> str:
    with pytest.raises(ModelFormatError) as error:
        check(folder, tensors, **config)
    text = str(error.value)
    assert text.startswith(f"{folder} cannot be converted: ")
    assert "\n" not in text
    return text


def test_what_goes_together(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path, GOOD[:1], tie_word_embeddings=True)
    check(tmp_path, GOOD[:1], tie_word_embeddings=None)
    check(tmp_path, GOOD[:1], architecture="NomicBertModel")
    check(tmp_path, ())
    check(tmp_path, vocab_size=99, text_config={"vocab_size": 8})
    check(tmp_path, num_experts_per_tok=[2, 4])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 9}, "model.embed_tokens.weight has 8 rows, and vocab_size in config.json is 9"),
        ({"hidden_size": 5}, "model.embed_tokens.weight has 4 columns, and hidden_size in config.json is 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok in config.json is 5, and there are 4 experts"),
        ({"moe_topk": [2, 5]}, "moe_topk in config.json is 5, and there are 4 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok in config.json is 0"),
        ({"text_config": {"top_k_experts": 17}}, "top_k_experts in config.json is 17, and there are 4"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in config.json is NaN"),
        ({"rope_scaling": {"factor": [1.0, float("nan")]}}, "rope_scaling.factor in config.json is NaN"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps in config.json is -1e-06"),
        ({"hidden_size": -4}, "hidden_size in config.json is -4"),
        ({"hidden_size": "4"}, "hidden_size in config.json is '4'"),
        ({"intermediate_size": [8, -8]}, "intermediate_size in config.json is [8, -8]"),
        ({"num_hidden_layers": True}, "num_hidden_layers in config.json is True"),
        (
            {"max_position_embeddings": 1 << 60},
            "max_position_embeddings in config.json is 1152921504606846976",
        ),
    ],
    ids=str,
)
def test_numbers(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, **config)


def test_heads(tmp_path: Path) -> None:
    assert "it has no head (lm_head.weight), and tie_word_embeddings" in refused(tmp_path, GOOD[:1])
    nested = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}
    assert "it has no head" in refused(tmp_path, GOOD[:1], **nested)
    short = (GOOD[0], tensor("lm_head.weight", 7, 4))
    assert "lm_head.weight has 7 rows, and vocab_size in config.json is 8" in refused(tmp_path, short)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {f"t{i}": i for i in range(9)}}}),
        ("tokenizer.json", {"model": {"vocab": [["t", 0.0]] * 9}}),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": 8, "content": "t8"}]}),
        ("added_tokens.json", {"t8": 8}),
    ],
    ids=str,
)
def test_tokenizers(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert f"{name} has token 8 (" in (text := refused(tmp_path))
    assert "vocab_size in config.json is 8: resize the embedding" in text
    # of a SentencePiece model the converter itself leaves out what is too much
    (tmp_path / "tokenizer.model").write_bytes(b"")
    check(tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"model": 1, "added_tokens": [1, {"id": "a"}]}', "{", "[" * 100_000]
)
def test_what_a_tokenizer_says_otherwise_is_the_converters(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    check(tmp_path)


def test_the_innermost_config_is_the_texts() -> None:
    config = {"a": 1, "b": 1, "thinker_config": {"a": 2, "text_config": {"a": 3}}}
    assert text_config(config)["a"] == 3
    assert text_config(config)["b"] == 1


def changed(source: Path, folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A copy of a checkpoint with other tensors, and other values in its config."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nothing_is_written_of_what_cannot_be_loaded(checkpoints: Any, tmp_path: Path) -> None:
    source = checkpoints["f32"]
    bad = {
        "top-k": (
            changed(source, tmp_path / "top-k", num_experts_per_tok=5),
            "is 5, and there are 4 experts",
        ),
        # what no check of ours knows is found on the planned header
        "kv-heads": (changed(source, tmp_path / "kv-heads", num_key_value_heads=1), "wrong shape"),
        "rope": (
            changed(source, tmp_path / "rope", rope_parameters={"rope_type": "default", "rope_theta": 0.0}),
            "rope.freq_base is 0.0, not more than 0",
        ),
        "no-norm": (
            changed(
                source,
                tmp_path / "no-norm",
                {
                    k: v
                    for k, v in load_file(source / "model.safetensors").items()
                    if k != "model.norm.weight"
                },
            ),
            "output_norm",
        ),
    }
    for folder, said in bad.values():
        out = tmp_path / "out" / "made.gguf"
        out.parent.mkdir(exist_ok=True)
        with pytest.raises(MobileError) as error:
            convert_checkpoint(folder, out, convert_runs.STACKED)
        assert said in str(error.value)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
        assert list(out.parent.iterdir()) == []
