"""The engine on files with one tensor per expert: what it computes from a stacked file, bit for bit.

The per-expert files are written here with the ``gguf`` package (``layout_files``), not by our converter.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import layout_files
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, on_stock, run, succeeded, tokens

from mobile_gguf.convert.gguf.layout import to_mobile
from mobile_gguf.gguf.info import read_gguf_info

LENGTHS = {
    7: 8,
    64: 4,
    513: 2,
}  # prompt length (513 does not fit one ubatch of 512) -> single tokens after it
BUDGETS: dict[str, int | str | None] = {"40%": "40%", "min": "min", "slots": 1 << 60, "all": 0, "plain": None}
FAMILIES = [
    "mixtral", "olmoe-bf16", "deepseek3", "llama4",
    "granitemoe-swa",  # gate and up in one tensor
    "gpt-oss-mxfp4",  # biases
    "qwen3moe-scales", "gemma4",  # scales; both
    "nemotron-h",  # no gate
    "qwen2moe-q8_0", "qwen3moe-q4_k",  # types that differ between layers
    "mixtral-split",
]  # fmt: skip


def generate() -> list[dict[str, Any]]:
    ops: list[dict[str, Any]] = []
    for n, n_steps in LENGTHS.items():
        ops += [
            {"op": "clear"},
            {"op": "decode", "tokens": tokens(n, 100 + n), "save": f"prefill-{n}"},
            {"op": "steps", "tokens": tokens(n_steps, 200 + n), "pos": n, "save": f"steps-{n}"},
        ]
    return ops


@cache
def stock(model: str, **settings: Any) -> dict[str, np.ndarray]:
    """The stock build's logits of ``generate`` on the stacked file, by name."""
    arrays = succeeded(on_stock(run("r", model, generate(), None, **settings))).arrays
    return {name.removeprefix("r/"): array for name, array in arrays.items()}


def assert_equals(outcome: engine_libs.Outcome, name: str, expected: dict[str, np.ndarray]) -> None:
    assert expected
    for array, values in expected.items():
        assert_same_bits(outcome.arrays[f"{name}/{array}"], values, f"{name}, {array}")


@pytest.mark.parametrize("model", FAMILIES)
def test_per_expert_file_equals_stacked(model: str, tmp_path: Path) -> None:
    source = tiny_models.path(model)
    # the gguf package gives a file's own alignment to the first part only
    split = {"split_max_tensors": 60, "alignment": 32} if model.endswith("split") else {}
    path = layout_files.write_per_expert(source, tmp_path / "m.gguf", **split)
    assert bool(split) == (len(layout_files.parts(path)) > 1)
    outcome = succeeded(on_engine(*(run(name, path, generate(), budget) for name, budget in BUDGETS.items())))
    for name in BUDGETS:
        assert_equals(outcome, name, stock(model))
    stacked = succeeded(on_engine(run("min", source, [], "min"))).runs["min"]["info"]
    for name in BUDGETS:
        info = outcome.runs[name]["info"]
        if name != "plain":
            assert info["n_expert"] == stacked["n_expert"]
            assert info["expert_bytes"] == stacked["expert_bytes"]
    assert outcome.runs["plain"]["info"] is None


# models whose experts can be cut: no biases or scales, blocks no longer than a segment
SEGMENTED = {"mixtral": 4, "deepseek3": 2, "llama4": 2, "granitemoe-swa": 4, "nemotron-h": 2}
QUANTISED = {"qwen2moe-q8_0": 2, "qwen3moe-q4_0": 8}


def assert_close(
    outcome: engine_libs.Outcome, name: str, expected: dict[str, np.ndarray], tolerance: float
) -> None:
    """Equal but for the order of summation, relative to the largest logit."""
    assert expected
    for array, values in expected.items():
        actual = outcome.arrays[f"{name}/{array}"]
        assert np.isfinite(actual).all()
        difference = np.abs(actual - values).max() / np.abs(values).max()
        assert difference < tolerance, f"{name}, {array}: {difference}"


@pytest.mark.parametrize("model", [*SEGMENTED, *QUANTISED])
def test_segments_equal_whole_experts(model: str, tmp_path: Path) -> None:
    """In the store and joined in ordinary buffers; the neurons of each expert are in another order."""
    n_segments, float_weights = (SEGMENTED | QUANTISED)[model], model in SEGMENTED
    settings: dict[str, Any] = {"f32_kv": True}  # half precision would blow differences up
    expected = stock(model, **settings)
    seed = 5 if float_weights else None  # quantised rows cannot be shuffled
    path = layout_files.write_per_expert(tiny_models.path(model), tmp_path / "m.gguf", n_segments, seed)
    runs = [run(name, path, generate(), budget, **settings) for name, budget in BUDGETS.items()]
    outcome = succeeded(on_engine(*runs))
    for name in BUDGETS:
        # a quantised model rounds activations, and rounds a sum of other parts differently
        assert_close(outcome, name, expected, 1e-5 if float_weights else 0.1)
        if name in ("40%", "min"):
            assert_equals(outcome, name, {array: outcome.arrays[f"slots/{array}"] for array in expected})
    assert_equals(outcome, "all", {array: outcome.arrays[f"plain/{array}"] for array in expected})
    if not float_weights:  # joined, it is the stacked file
        assert_equals(outcome, "plain", expected)


@pytest.mark.parametrize(
    "model", ["mixtral", "qwen3moe-q4_0", "qwen3moe-iq4_nl", "qwen3moe-q4_k", "gpt-oss-mxfp4"]
)
def test_repacked_experts_equal_stacked(model: str, tmp_path: Path) -> None:
    """Buffers that want a tensor whole, as the processor's own form of a quantised one does."""
    repack: dict[str, Any] = {"use_extra_bufts": True}
    path = layout_files.write_per_expert(tiny_models.path(model), tmp_path / "m.gguf")
    runs = [run(str(budget), path, generate(), budget, **repack) for budget in (None, 0)]
    outcome = succeeded(on_engine(*runs))
    for each in runs:
        assert_equals(outcome, each["name"], stock(model, **repack))


@pytest.mark.parametrize(("model", "n_segments"), [("mixtral", 1), ("granitemoe-swa", 2), ("gemma4", 1)])
def test_what_convert_writes(model: str, n_segments: int, tmp_path: Path) -> None:
    """Our converter's files are those of ``layout_files``, as far as the engine can tell."""
    source, path = tiny_models.path(model), tmp_path / "convert.gguf"
    to_mobile(source, path, segments=n_segments, segment_order="natural")
    expected = layout_files.write_per_expert(source, tmp_path / "test.gguf", n_segments)
    outcome = succeeded(on_engine(*(
        run(f"{file.stem}, {name}", file, generate(), BUDGETS[name])
        for file in (path, expected) for name in ("min", "plain")
    )))  # fmt: skip
    for name in ("min", "plain"):
        wanted = {array: outcome.arrays[f"test, {name}/{array}"] for array in stock(model)}
        assert_equals(outcome, f"convert, {name}", wanted)


@pytest.mark.parametrize("mode", [-1, 1, 2, 3, 4], ids=["auto", "mmap", "mlock", "mmap and mlock", "direct"])
def test_ways_to_load(mode: int, tmp_path: Path) -> None:
    """A per-expert file is never mapped, whoever asks for it."""
    path = layout_files.write_per_expert(tiny_models.path("mixtral"), tmp_path / "m.gguf")
    runs = [run(str(budget), path, generate(), budget, load_mode=mode) for budget in (None, 0, "min")]
    outcome = succeeded(on_engine(*runs))
    for each in runs:
        assert_equals(outcome, each["name"], stock("mixtral"))


def test_old_files_of_one_tensor_per_expert(tmp_path: Path) -> None:
    """As llama.cpp wrote them once: without metadata of ours, aligned to 32."""
    path = layout_files.rewrite(
        tiny_models.path("mixtral"), tmp_path / "m.gguf",
        lambda tensors: list(layout_files.per_expert(tensors)), alignment=32,
    )  # fmt: skip
    runs = [run(name, path, generate(), BUDGETS[name]) for name in ("min", "plain")]
    outcome = succeeded(on_engine(*runs))
    for name in ("min", "plain"):
        assert_equals(outcome, name, stock("mixtral"))


def test_a_nan_in_an_expert_is_found(tmp_path: Path) -> None:
    """With check_tensors; in a stacked tensor that is put together while it is loaded."""

    def spoil(tensors: list[layout_files.Tensor]) -> list[layout_files.Tensor]:
        experts = list(layout_files.per_expert(tensors))
        at = next(i for i, (name, _, _) in enumerate(experts) if name == "blk.2.ffn_up.3.weight")
        name, data, kind = experts[at]
        experts[at] = name, np.full_like(data, np.nan), kind
        return experts

    path = layout_files.rewrite(tiny_models.path("mixtral"), tmp_path / "m.gguf", spoil)
    checked: dict[str, Any] = {"check_tensors": True}
    outcome = on_engine(run("bad", path, [], None, **checked), run("unchecked", path, [], None))
    assert not outcome.runs["bad"]["loaded"]
    assert "blk.2.ffn_up_exps.weight" in outcome.runs["bad"]["load_error"]
    assert outcome.runs["unchecked"]["loaded"]


@pytest.mark.parametrize(("model", "n_segments"), [("mixtral", 1), ("mixtral", 4), ("qwen3moe-q4_k", 1)])
def test_byte_counts_are_the_engines(model: str, n_segments: int, tmp_path: Path) -> None:
    path = layout_files.write_per_expert(tiny_models.path(model), tmp_path / "m.gguf", n_segments)
    info, spec = read_gguf_info(path), tiny_models.MODELS[model]
    assert (info.n_layer_moe, info.n_expert, info.segments) == (spec.n_layer_moe, spec.n_expert, n_segments)
    theirs = succeeded(on_engine(run("r", path, [{"op": "n_segments"}], "min")))
    engine = theirs.runs["r"]["info"]
    assert theirs.ops("r", "n_segments")[0]["status"] == n_segments
    assert engine["n_expert"] == spec.n_expert
    assert engine["expert_bytes"] == info.expert_bytes
    figures = (engine["budget_min_bytes"], engine["budget_all_bytes"])
    by_alignment = [[layer.store_bytes(a) for layer in info.expert_layers] for a in (512, 4096)]
    # slots of several sizes are rounded up to pages
    largest = [max(layers) for layers in by_alignment]
    assert largest[0] <= figures[0] <= largest[1]
    assert sum(by_alignment[0]) <= figures[1] <= sum(by_alignment[1])
    assert (info.budget_min_bytes, info.budget_all_bytes) == (largest[1], sum(by_alignment[1]))


def test_truncated_file(tmp_path: Path) -> None:
    """llama.cpp itself says what is wrong; nothing crashes."""
    path = layout_files.write_per_expert(tiny_models.path("mixtral"), tmp_path / "m.gguf")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5000)
    outcome = on_engine(*(run(str(budget), path, [], budget) for budget in (None, 0, 1 << 60)))
    for result in outcome.runs.values():
        assert not result["loaded"]
        assert "not within the file bounds" in result["log"]


def test_quantising_needs_a_stacked_file(tmp_path: Path) -> None:
    """libllama's quantiser reads a tensor in one piece, which these are not."""
    path = layout_files.write_per_expert(tiny_models.path("mixtral"), tmp_path / "m.gguf")
    op = {"op": "quantize", "out": str(tmp_path / "q.gguf"), "ftype": 7}
    outcome = on_engine(run("r", path, [op], None))
    result = outcome.ops("r", "quantize")[0]
    assert result["rc"] != 0
    assert "export it" in result["error"]
