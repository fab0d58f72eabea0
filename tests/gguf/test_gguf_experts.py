"""Experts as tensors of their own: geometry of good files, a reason for every bad one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import layout_files
import numpy as np
import pytest

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf.info import read_gguf_info

N_LAYER, N_EXPERT, N_EMBD, N_FF = 2, 4, 32, 64
Tensors = list[layout_files.Tensor]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "stacked.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(N_LAYER)
    writer.add_embedding_length(N_EMBD)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((100, N_EMBD), np.float32))
    for layer in range(N_LAYER):
        for name in ("gate", "up", "down"):
            shape = (N_EXPERT, N_EMBD, N_FF) if name == "down" else (N_EXPERT, N_FF, N_EMBD)
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_per_expert_has_the_geometry_of_stacked(stacked: Path, tmp_path: Path) -> None:
    ours = read_gguf_info(layout_files.write_per_expert(stacked, tmp_path / "ours.gguf"))
    theirs = read_gguf_info(stacked)
    assert (theirs.layout, theirs.segments) == ("stacked", 1)
    assert (ours.layout, ours.segments) == ("per-expert", 1)
    for fact in (
        "expert_bytes",
        "dense_bytes",
        "tensor_bytes",
        "n_expert",
        "budget_min_bytes",
        "budget_all_bytes",
    ):
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    assert [layer.n_expert for layer in ours.expert_layers] == [N_EXPERT] * N_LAYER


def test_segments(stacked: Path, tmp_path: Path) -> None:
    info = read_gguf_info(layout_files.write_per_expert(stacked, tmp_path / "ours.gguf", 4))
    assert (info.layout, info.segments) == ("per-expert", 4)
    matrix = N_EMBD * N_FF * 4
    assert [(layer.n_expert, layer.matrix_bytes) for layer in info.expert_layers] == [
        (N_EXPERT, (matrix,) * 3)
    ] * N_LAYER
    assert info.expert_bytes == N_LAYER * N_EXPERT * 3 * matrix
    # a segment of 2048 bytes that starts anywhere in its block of 4096 touches two of them
    assert info.budget_min_bytes == N_EXPERT * 4 * 3 * 8192


def changed(name: str, data: np.ndarray) -> Callable[[Tensors], Tensors]:
    kind = gguf.GGMLQuantizationType.F16 if data.dtype == np.float16 else gguf.GGMLQuantizationType.F32
    return lambda tensors: [(name, data, kind) if t[0] == name else t for t in tensors]


def with_tensor(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    extra = (name, np.ones(shape, np.float32), gguf.GGMLQuantizationType.F32)
    return lambda tensors: [*tensors, extra]


# what is done to a good file, and the words that say what is wrong with it
HOSTILE: dict[str, tuple[Callable[[Tensors], Tensors], int, list[str]]] = {
    "gap": (
        lambda tensors: [t for t in tensors if t[0] != "blk.1.ffn_up.2.weight"], 1,
        ["layer 1, ffn_up", "expert 2 is missing"],
    ),
    "last one missing": (
        lambda tensors: [t for t in tensors if ".3." not in t[0]], 1, ["expert 3 is missing"],
    ),
    "first one missing": (
        lambda tensors: [t for t in tensors if ".ffn_down.0." not in t[0]], 1,
        ["ffn_down", "expert 0 is missing"],
    ),
    "one too many": (with_tensor("blk.0.ffn_gate.4.weight", N_FF, N_EMBD), 1, ["layer 0, ffn_gate", "4"]),
    "far too many": (
        with_tensor("blk.0.ffn_gate.999999.weight", N_FF, N_EMBD), 1, ["layer 0, ffn_gate", "999999"],
    ),
    "another type": (
        changed("blk.0.ffn_gate.1.weight", np.ones((N_FF, N_EMBD), np.float16)), 1,
        ["expert 1", "type or shape"],
    ),
    "another shape": (
        changed("blk.0.ffn_gate.1.weight", np.ones((N_FF, 2 * N_EMBD), np.float32)), 1,
        ["expert 1", "type or shape"],
    ),
    "twice": (
        with_tensor("blk.0.ffn_gate_exps.weight", N_EXPERT, N_FF, N_EMBD), 1, ["layer 0, ffn_gate", "twice"],
    ),
    "segment missing": (
        lambda tensors: [t for t in tensors if t[0] != "blk.1.ffn_up.5.weight"], 2,
        ["layer 1, ffn_up", "expert 2, segment 1 is missing"],
    ),
    "segments and biases": (
        with_tensor("blk.0.ffn_up_exps.bias", N_EXPERT, N_FF), 2, ["blk.0.ffn_up_exps.bias", "segments"],
    ),
}  # fmt: skip


def hostile(case: str, stacked: Path, folder: Path) -> Path:
    """The file of a case of HOSTILE."""
    change, n_segments, _ = HOSTILE[case]
    return layout_files.rewrite(
        stacked, folder / "hostile.gguf",
        lambda tensors: change(list(layout_files.per_expert(tensors, n_segments))),
        set_keys=layout_files.mobile_keys(n_segments),
    )  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_wrong_is_said(case: str, stacked: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError) as caught:
        read_gguf_info(hostile(case, stacked, tmp_path))
    text = str(caught.value)
    assert "hostile.gguf" in text
    assert "\n" not in text
    # the last one is known by its number
    assert all(word in text for word in HOSTILE[case][2]), text


U32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("mobile.version", (2, U32), "update mobile-gguf"),
        ("mobile.version", ("1", STRING), "mobile.version"),
        ("mobile.layout", ("spiral", STRING), "spiral"),
        ("mobile.layout", (1, U32), "mobile.layout"),
        ("mobile.segments", (0, U32), "mobile.segments"),
        ("mobile.segments", ("2", STRING), "mobile.segments"),
        ("mobile.segments", (1 << 20, U32), "mobile.segments"),
    ],
)
def test_metadata_of_a_newer_version(
    key: str, value: tuple[Any, gguf.GGUFValueType], word: str, stacked: Path, tmp_path: Path
) -> None:
    path = layout_files.rewrite(
        stacked, tmp_path / "newer.gguf", lambda tensors: list(layout_files.per_expert(tensors)),
        set_keys=layout_files.mobile_keys() | {key: value},
    )  # fmt: skip
    with pytest.raises(ModelFormatError, match=word) as caught:
        read_gguf_info(path)
    assert "newer.gguf" in str(caught.value)


def test_segments_of_stacked_experts(stacked: Path, tmp_path: Path) -> None:
    path = layout_files.rewrite(stacked, tmp_path / "x.gguf", set_keys={"mobile.segments": (2, U32)})
    with pytest.raises(ModelFormatError, match=r"x\.gguf .*segments"):
        read_gguf_info(path)


def test_unknown_metadata_and_tensors_of_ours_are_ignored(stacked: Path, tmp_path: Path) -> None:
    path = layout_files.write_per_expert(stacked, tmp_path / "a.gguf")
    plain = layout_files.rewrite(
        stacked, tmp_path / "b.gguf", lambda tensors: list(layout_files.per_expert(tensors)),
        set_keys=layout_files.mobile_keys() | {"mobile.of.tomorrow": ("x", STRING)},
    )  # fmt: skip
    assert read_gguf_info(path).tensor_bytes == read_gguf_info(plain).tensor_bytes


def test_overlapping_tensors(stacked: Path, tmp_path: Path) -> None:
    path = layout_files.write_per_expert(stacked, tmp_path / "x.gguf")
    raw = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.1.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8 + 4  # dimensions, type; then the offset
    raw[at : at + 8] = (int.from_bytes(raw[at : at + 8], "little") - 4096).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(ModelFormatError, match=r"x\.gguf .*overlap"):
        read_gguf_info(path)


def test_duplicate_names(stacked: Path, tmp_path: Path) -> None:
    path = layout_files.write_per_expert(stacked, tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up.1.weight", b"blk.0.ffn_up.2.weight"))
    with pytest.raises(ModelFormatError, match=r"x\.gguf .*ffn_up\.2\.weight is there twice"):
        read_gguf_info(path)


def test_what_stock_llama_cpp_can_load(stacked: Path, tmp_path: Path) -> None:
    assert read_gguf_info(stacked).stock
    assert not read_gguf_info(layout_files.write_per_expert(stacked, tmp_path / "a.gguf")).stock
    calibrated = layout_files.rewrite(
        stacked, tmp_path / "b.gguf", lambda tensors: with_tensor("mobile.hotness", 3, 4)(tensors)
    )
    info = read_gguf_info(calibrated)
    assert (info.layout, info.stock) == ("stacked", False)
