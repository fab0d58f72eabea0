"""GGUF headers: facts of good files, a reason for every bad one."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobile_gguf.errors import MobileError, ModelFormatError, ModelNotFoundError
from mobile_gguf.gguf.header import read_header
from mobile_gguf.gguf.info import read_gguf_info

N_LAYER, N_EXPERT, N_EMBD, N_FF, N_VOCAB = 3, 4, 32, 64, 5000


def write_model(path: Path, *, moe: bool = True, merged: bool = False, more=None) -> Path:
    """A small model's GGUF, written by the gguf package; layer 0 is dense."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 2, 1])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_token_list([f"t{i}" for i in range(N_VOCAB)])
    writer.add_chat_template("{{ messages }}")
    if moe:
        writer.add_expert_count(N_EXPERT)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(N_FF)
    for key, value in (more or {}).items():
        writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((N_VOCAB, N_EMBD), np.float32))
    if moe:
        quantized = gguf.quants.quantize(
            np.ones((N_EXPERT, N_FF, N_EMBD), np.float32), gguf.GGMLQuantizationType.Q8_0
        )
        for layer in range(1, N_LAYER):
            names = ["gate_up", "down"] if merged else ["gate", "up", "down"]
            for name in names:
                tensor = f"blk.{layer}.ffn_{name}_exps.weight"
                writer.add_tensor(tensor, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{layer}.ffn_up_exps.bias", np.zeros((N_EXPERT, N_FF), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


MATRIX = N_FF * N_EMBD // 32 * 34  # bytes of one expert's matrix in Q8_0


def test_facts(model):
    info = read_gguf_info(model)
    assert (info.name, info.architecture, info.license, info.quantization) == (
        "Tiny",
        "qwen3moe",
        "apache-2.0",
        "Q8_0",
    )
    assert (info.n_layer, info.n_layer_moe, info.n_expert, info.n_expert_used) == (3, 2, 4, 2)
    assert (info.n_ctx_train, info.n_embd, info.n_vocab, info.n_ff_expert) == (2048, 32, 5000, 64)
    assert info.n_head == (4,) * 3
    assert info.chat_template == "{{ messages }}"
    assert info.file_bytes == model.stat().st_size


def test_byte_counts(model):
    info = read_gguf_info(model)
    assert info.expert_bytes == 2 * 3 * N_EXPERT * MATRIX
    assert info.dense_bytes == N_VOCAB * N_EMBD * 4 + 2 * N_EXPERT * N_FF * 4  # biases are not the store's
    assert info.expert_bytes + info.dense_bytes == info.tensor_bytes
    # each matrix starts anywhere within a block of 4096 bytes
    assert info.budget_min_bytes == N_EXPERT * 3 * 8192
    assert info.budget_all_bytes == 2 * info.budget_min_bytes


def test_our_reading_is_the_gguf_packages(model):
    header, reader = read_header(model), gguf.GGUFReader(model)
    assert {t.name: t.n_bytes for t in header.tensors} == {t.name: int(t.n_bytes) for t in reader.tensors}
    assert {t.name: t.offset + header.data_start for t in header.tensors} == {
        t.name: int(t.data_offset) for t in reader.tensors
    }
    assert set(header.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}


def test_merged_gate_and_up(tmp_path):
    info = read_gguf_info(write_model(tmp_path / "m.gguf", merged=True))
    assert [len(layer.matrix_bytes) for layer in info.expert_layers] == [2, 2]


def test_one_tensor_per_expert(tmp_path):
    path = tmp_path / "ours.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    for expert in range(3):
        for name in ("gate", "up", "down"):
            writer.add_tensor(f"blk.0.ffn_{name}.{expert}.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = read_gguf_info(path)
    assert info.is_moe
    assert [(layer.n_expert, layer.matrix_bytes) for layer in info.expert_layers] == [(3, (256, 256, 256))]


def test_a_dense_model_has_no_experts(tmp_path):
    info = read_gguf_info(write_model(tmp_path / "dense.gguf", moe=False))
    assert not info.is_moe
    assert (info.expert_bytes, info.n_expert_used, info.budget_min_bytes) == (0, 0, 0)


# what is wrong with a file, and the words that say so


def check(path: Path, *words: str, error: type[MobileError] = ModelFormatError) -> None:
    with pytest.raises(error) as caught:
        read_gguf_info(path)
    text = str(caught.value)
    assert str(path.name) in text
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_missing(tmp_path):
    check(tmp_path / "none.gguf", "no such", error=ModelNotFoundError)


def test_directory(tmp_path):
    check(tmp_path, "directory")


@pytest.mark.parametrize(("content", "word"), [(b"", "empty"), (b"GG", "GG"), (b"PK\x03\x04 zip", "PK")])
def test_not_a_gguf(tmp_path, content, word):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    check(path, "not a GGUF", word)


def patched(model: Path, tmp_path: Path, offset: int, value: bytes) -> Path:
    data = bytearray(model.read_bytes())
    data[offset : offset + len(value)] = value
    path = tmp_path / "patched.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("version", "word"), [(1, "version 1"), (4, "version 4"), (0x03000000, "big-endian")]
)
def test_versions(model, tmp_path, version, word):
    check(patched(model, tmp_path, 4, struct.pack("<I", version)), word)


@pytest.mark.parametrize("offset", [8, 16])
def test_counts_beyond_the_file(model, tmp_path, offset):
    check(patched(model, tmp_path, offset, struct.pack("<Q", 1 << 60)), "")


def test_a_string_beyond_the_file(model, tmp_path):
    # the first key, and the value of general.architecture
    check(patched(model, tmp_path, 24, struct.pack("<Q", 1 << 40)), "key claims")
    value = 24 + 8 + len("general.architecture") + 4
    check(patched(model, tmp_path, value, struct.pack("<Q", 1 << 40)), "string")
    check(patched(model, tmp_path, value, struct.pack("<Q", 1 << 22)), "truncated")


def test_truncated_data_says_how_much_is_missing(model, tmp_path):
    whole = model.stat().st_size
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[: whole - 5000])
    check(path, "truncated", f"need {whole}", f"has {whole - 5000}")


def test_truncated_header(model, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[:300])
    check(path, "header is truncated", "300 bytes")


def test_an_expert_in_a_layer_that_does_not_exist(tmp_path):
    path = write_model(tmp_path / "x.gguf")
    data = path.read_bytes().replace(b"blk.2.ffn_down", b"blk.7.ffn_down")
    path.write_bytes(data)
    check(path, "layer 7", "3 layers")


def test_no_architecture(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    check(path, "not a model")


def test_parts_of_a_split(tmp_path, model):
    split = {"split.count": 2, "split.tensors.count": 0}
    first = write_model(tmp_path / "m-00001-of-00002.gguf", more=split | {"split.no": 0})
    with pytest.raises(ModelNotFoundError, match="part 2 of 2"):
        read_gguf_info(first)
    second = write_model(tmp_path / "m-00002-of-00002.gguf", moe=False, more=split | {"split.no": 1})
    info = read_gguf_info(first)
    assert info.files == (first, second)
    assert info.tensor_bytes == read_gguf_info(model).tensor_bytes + N_VOCAB * N_EMBD * 4
    check(second, "part 2 of 2", "m-00001-of-00002.gguf")
    check(first.rename(tmp_path / "renamed.gguf"), "split of 2")


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_a_damaged_header_is_read_or_refused(model, tmp_path, data):
    raw = bytearray(model.read_bytes())
    # the token list is skipped over: damage the rest more often
    spots = st.one_of(st.integers(0, 600), st.integers(0, len(raw) - 1))
    for position, value in data.draw(st.lists(st.tuples(spots, st.integers(0, 255)), max_size=4)):
        raw[position] = value
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(raw[:cut])
    try:
        info = read_gguf_info(path)
    except MobileError as error:
        named = "fuzz.gguf" in str(error)
    else:
        named = info.expert_bytes <= info.tensor_bytes
    assert named
