"""Checkpoints that are damaged, incomplete or no MoE: one clear line each, before anything is done."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mobile_gguf.convert.hf.checkpoint import check_experts, expert_counts, read_checkpoint
from mobile_gguf.convert.hf.safetensors_header import MAX_HEADER_BYTES, read_safetensors_header
from mobile_gguf.errors import MobileError, ModelFormatError, ModelNotFoundError

KNOWN = {"Qwen3MoeForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"}
N_EXPERT, N_LAYER = 3, 2


def tensors() -> dict[str, np.ndarray]:
    values = {"model.embed_tokens.weight": np.ones((8, 4), np.float16)}
    for layer in range(N_LAYER):
        prefix = f"model.layers.{layer}.mlp"
        values[f"{prefix}.gate.weight"] = np.ones((N_EXPERT, 4), np.float16)
        for expert in range(N_EXPERT):
            for part in ("gate_proj", "up_proj", "down_proj"):
                values[f"{prefix}.experts.{expert}.{part}.weight"] = np.ones((4, 4), np.float16)
    return values


CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": N_LAYER, "num_experts": N_EXPERT,
}  # fmt: skip


def write(folder: Path, values: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if values is None else values, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def shard(folder: Path) -> Path:
    """Splits a checkpoint's weights into two files with an index."""
    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    index = {}
    for number, part in enumerate((names[:5], names[5:])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: values[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(MobileError) as error:
        read_checkpoint(folder, KNOWN)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_a_whole_one(tmp_path: Path) -> None:
    for folder in (write(tmp_path / "one"), shard(write(tmp_path / "two"))):
        found = read_checkpoint(folder, KNOWN)
        assert found.n_expert == N_EXPERT
        assert found.dtype == "F16"
        assert {tensor.name for tensor in found.tensors} == set(tensors())
        for tensor in found.tensors:
            data = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes]
            assert (
                np.frombuffer(data, np.float16).reshape(tensor.shape).tolist()
                == tensors()[tensor.name].tolist()
            )


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors().items() if not name.startswith(names)}


def test_configs(tmp_path: Path) -> None:
    assert "no directory" in refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    folder = write(tmp_path / "f")
    for text in ("", "{", "[1]", "[" * 100_000, '"text"', "\x00\xff", "1" * 5000):
        (folder / "config.json").write_text(text)
        assert "JSON" in refused(folder)
    assert "names no architecture" in refused(write(folder, architectures=None))
    assert "names no architecture" in refused(write(folder, architectures=[17]))
    text = refused(write(folder, architectures=["Qwen3MoeForCasualLM"]))
    assert "it knows Qwen3MoeForCausalLM" in text
    assert "cannot convert the architecture 'Nonsense'" in refused(write(folder, architectures=["Nonsense"]))
    text = refused(write(folder, without("model.layers"), num_experts=0, architectures=["Qwen3ForCausalLM"]))
    assert "is a dense model (Qwen3ForCausalLM)" in text
    write(folder)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(folder)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_local_experts": 8, "num_experts": 8}, {8}),
        ({"text_config": {"n_routed_experts": 64}}, {64}),
        ({"thinker_config": {"text_config": {"num_experts": 64}}}, {64}),
        ({"num_experts": [4, 16, 4]}, {4, 16}),
        ({"num_experts": True}, set()),
        ({"num_experts": "8"}, set()),
        ({"num_local_experts": 0}, {0}),
    ],
)
def test_expert_counts(config: dict[str, Any], count: set[int]) -> None:
    assert expert_counts(config) == count


def test_missing_experts(tmp_path: Path) -> None:
    one = "model.layers.1.mlp.experts.2.up_proj.weight"
    text = refused(write(tmp_path, without(one)))
    assert "model.layers.1.mlp.experts has no up_proj for expert 2 of 3" in text
    text = refused(write(tmp_path, without("model.layers.0.mlp.experts.1.", "model.layers.0.mlp.experts.2.")))
    assert "for expert 1 of 3" in text
    # a part that all experts of one layer lack, all experts of one layer, one layer
    no_up = {n: v for n, v in tensors().items() if not (".1." in n and "up_proj" in n)}
    no_up |= {n: v for n, v in tensors().items() if n.startswith("model.layers.0")}
    no_up = {n: v for n, v in no_up.items() if not (n.startswith("model.layers.1") and "up_proj" in n)}
    assert "has no up_proj for expert 0 of 3" in refused(write(tmp_path, no_up))
    text = refused(write(tmp_path, without("model.layers.1.mlp.experts")))
    assert "model.layers.1.mlp has a router and no experts" in text
    assert "layer 1 of 2 has no tensors" in refused(write(tmp_path, without("model.layers.1")))
    assert "config.json says 2" in refused(write(tmp_path, num_experts=2))
    assert "for expert 3 of 5" in refused(write(tmp_path, num_experts=5))


def test_stacked_experts_and_dense_first_layers_are_whole() -> None:
    stacked = [f"model.layers.{n}.mlp.experts.gate_up_proj" for n in range(2)]
    routers = [f"model.layers.{n}.mlp.router.weight" for n in range(2)]
    check_experts(Path("x"), [*stacked, *routers], 4, 2)
    with pytest.raises(ModelFormatError, match="no experts"):
        check_experts(Path("x"), [*stacked[:1], *routers], 4, 2)
    dense_first = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(2)]
    check_experts(Path("x"), ["model.layers.0.mlp.up_proj.weight", *dense_first], 2, 2)
    # layers of different sizes, and matrices stored in different ways
    mixed = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(3)]
    mixed += [
        f"model.layers.1.mlp.experts.{e}.up_proj.weight_{p}" for e in range(2) for p in ("packed", "scale")
    ]
    check_experts(Path("x"), mixed, 0, 2)
    with pytest.raises(ModelFormatError, match="for expert 1 of 3"):
        check_experts(Path("x"), [name for name in mixed if ".0.mlp.experts.1." not in name], 0, 2)
    # a number of experts that would take all memory to list
    with pytest.raises(ModelFormatError, match="for expert 2 of"):
        check_experts(Path("x"), dense_first, 1 << 60, 0)
    check_experts(Path("x"), [f"model.layers.1.mlp.experts.{'9' * 400}.up_proj.weight"], 2, 0)


def test_indexes(tmp_path: Path) -> None:
    def indexed(name: str, change: Callable[[dict[str, Any]], Any]) -> str:
        folder = shard(write(tmp_path / name))
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))
        return refused(folder)

    def lost(names: dict[str, str]) -> None:
        names["extra"] = "model-00003-of-00003.safetensors"

    assert "model-00003-of-00003.safetensors of 3 files is missing" in indexed("a", lost)
    escape = {"x": "../../secret.safetensors"}
    assert "which is no file beside it" in indexed("b", lambda names: names.update(escape))
    assert "which is no file beside it" in indexed("c", lambda names: names.update(x=5))
    absent = {"nowhere": "model-00001-of-00002.safetensors"}
    assert "does not hold nowhere" in indexed("d", lambda names: names.update(absent))
    assert "not in the index" in indexed("e", lambda names: names.popitem())
    assert "has no weight_map" in indexed("f", lambda names: names.clear())
    folder = shard(write(tmp_path / "g"))
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors of 2 files is missing" in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "model-00001-of-00002.safetensors of 2 files is missing" in refused(folder)
    folder = write(tmp_path / "h")
    save_file({"model.embed_tokens.weight": np.ones(3)}, folder / "model-extra.safetensors")
    assert "is in model-extra.safetensors and in model.safetensors" in refused(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model-extra.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="has no weights"):
        read_checkpoint(folder, KNOWN)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F16", shape: Any = (2,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "truncated"),
        (b"\x01\x00\x00", "truncated"),
        (raw(b"{}", length=3), "truncated"),
        (raw(b"{}", length=1 << 63), "truncated"),
        (raw(b"{", b"1234"), "not JSON"),
        (raw(b"\xff\xfe{}"), "not JSON"),
        (raw(b"[" * 50_000), "not JSON"),
        (raw(b"[]"), "no JSON object"),
        (raw({"a": 1}), "nothing usable about tensor a"),
        (raw({"a": entry(dtype="F4")}, b"1234"), "the type F4"),
        (raw({"a": entry(dtype=None)}, b"1234"), "the type None"),
        (raw({"a": entry(shape=[-2])}, b"1234"), "impossible shape"),
        (raw({"a": entry(shape=[1.5])}, b"1234"), "impossible shape"),
        (raw({"a": entry(shape=[True, True])}, b"1234"), "impossible shape"),
        (raw({"a": entry(shape=[1] * 9)}, b"1234"), "impossible shape"),
        (raw({"a": entry(shape=[1 << 40, 1 << 40])}, b"1234"), "4 bytes, which is not F16"),
        (raw({"a": entry(offsets=[4, 0])}, b"1234"), "impossible range"),
        (raw({"a": entry(offsets=[0, 1 << 70])}, b"1234"), "impossible range"),
        (raw({"a": entry(offsets=[0, 6])}, b"123456"), "6 bytes, which is not F16"),
        (raw({".1" * 9000: entry()}, b"1234"), "18000 characters"),
        (raw({"a": entry()}, b"12"), "truncated"),
        (raw({"a": entry()}, b"123456"), "the file has"),
        (raw({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"), "overlaps"),
        (raw({"a": entry(), "b": entry(offsets=[6, 10])}, b"1234567890"), "gap"),
        (raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"), "twice"),
    ],
)
def test_headers(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError) as error:
        read_safetensors_header(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # a hole: it takes no space
    with pytest.raises(ModelFormatError, match="its header claims"):
        read_safetensors_header(path)


VALID = raw(
    {"__metadata__": {"format": "pt"}, "a.weight": entry(), "b.weight": entry("F32", [1, 2], [4, 12])},
    b"123456789012",
)


@settings(max_examples=400, deadline=None)
@given(
    cut=st.integers(0, len(VALID)),
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=3),
    whole=st.booleans(),
)
def test_no_edit_of_a_file_crashes(
    tmp_path_factory: pytest.TempPathFactory, cut: int, edits: list[tuple[int, int]], whole: bool
) -> None:
    data = bytearray(VALID)
    for place, value in edits:
        data[place] = value
    check_header(tmp_path_factory, bytes(data if whole else data[:cut]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OFFSETS = st.lists(st.integers(-2, 16) | st.just(1 << 64), max_size=3)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F16", "F32", "U8", "X"]) | JSON, "shape": OFFSETS | JSON},
    optional={"data_offsets": OFFSETS | JSON},
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=4) | JSON, n_bytes=st.integers(0, 16)
)
def test_no_header_crashes(tmp_path_factory: pytest.TempPathFactory, header: Any, n_bytes: int) -> None:
    check_header(tmp_path_factory, raw(header, bytes(n_bytes)))


def check_header(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """One line of ours, or tensors that lie in the file one after the other."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        found = read_safetensors_header(path)
    except ModelFormatError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
        return
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for tensor in found:
        assert tensor.offset == end
        end += tensor.n_bytes
    assert end == len(data)
