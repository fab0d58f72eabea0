"""Importance matrices: both file formats, damaged ones, and what they change."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_gguf.convert.gguf.hashes import tensor_hashes
from mobile_gguf.convert.options import ConvertOptions
from mobile_gguf.convert.quantize import run as quantize
from mobile_gguf.convert.quantize.imatrix import read_imatrix
from mobile_gguf.errors import MobileError, ModelFormatError, ModelNotFoundError, UsageError
from mobile_gguf.gguf.header import read_header

N_IN, N_FF, N_EXPERT = 256, 256, 4


def write_gguf_imatrix(path: Path, entries: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """sums float32 [n_expert, n_in] and counts float32 [n_expert, 1], as llama-imatrix writes them."""
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_bytes(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, values.size)
        data += values.astype("<f4").tobytes()
    return data + tail


def write_tiny_moe(path: Path) -> Path:
    """A qwen3moe of one layer, float32: just what the quantiser looks at."""
    rng = np.random.default_rng(5)
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(N_IN)
    writer.add_feed_forward_length(N_FF)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(64)
    for name, shape in {
        "token_embd": (64, N_IN), "output": (64, N_IN), "blk.0.attn_q": (N_IN, N_IN),
        "blk.0.ffn_gate_inp": (N_EXPERT, N_IN), "blk.0.ffn_gate_exps": (N_EXPERT, N_FF, N_IN),
        "blk.0.ffn_up_exps": (N_EXPERT, N_FF, N_IN), "blk.0.ffn_down_exps": (N_EXPERT, N_IN, N_FF),
    }.items():  # fmt: skip
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moe(tmp_path_factory.mktemp("model") / "model.gguf")


def importance(seed: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    entries = {"blk.0.attn_q.weight": (rng.random((1, N_IN)) ** 8 * 50, np.full((1, 1), 50.0))}
    for part in ("gate", "up", "down"):
        counts = np.arange(N_EXPERT, dtype=np.float32)[:, None] * 10  # expert 0 was never used
        sums = rng.random((N_EXPERT, N_IN)) ** 8 * counts
        entries[f"blk.0.ffn_{part}_exps.weight"] = (sums, counts)
    return entries


def quantised(model: Path, out: Path, outtype: str, imatrix: Path | None) -> Path:
    request = quantize.request_from(ConvertOptions(outtype=outtype, imatrix=imatrix, threads=2), 2)
    quantize.quantize(model, out, request, progress=lambda text, done: None)
    return out


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    entries = importance()
    new = read_imatrix(write_gguf_imatrix(tmp_path / "new.gguf", entries))
    means = {name: sums / np.maximum(counts, 1) for name, (sums, counts) in entries.items()}
    for name, (_, counts) in entries.items():
        means[name][counts[:, 0] == 0] = 1
    tail = struct.pack("<ii", 7, 8) + b"wiki.txt"
    old = tmp_path / "old.dat"
    old.write_bytes(legacy_bytes({name: (3, 3 * mean.reshape(-1)) for name, mean in means.items()}, tail))
    legacy = read_imatrix(old)
    assert (new.dataset, new.n_chunks) == (legacy.dataset, legacy.n_chunks) == ("wiki.txt", 7)
    assert new.values.keys() == legacy.values.keys() == entries.keys()
    for name, values in new.values.items():
        np.testing.assert_allclose(values, legacy.values[name], rtol=1e-6)
        np.testing.assert_allclose(values, means[name].reshape(-1), rtol=1e-6)


def test_a_legacy_file_may_end_after_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(legacy_bytes({"a.weight": (0, np.arange(4.0))}))
    matrix = read_imatrix(path)
    assert matrix.values["a.weight"].tolist() == [0, 1, 2, 3]
    assert matrix.n_chunks == 0


def test_the_quantiser_hears_it(model: Path, tmp_path: Path) -> None:
    first = write_gguf_imatrix(tmp_path / "first.gguf", importance(1))
    second = write_gguf_imatrix(tmp_path / "second.gguf", importance(2))
    files = [
        quantised(model, tmp_path / f"{number}.gguf", "q4_k_m", imatrix)
        for number, imatrix in enumerate((None, first, second))
    ]
    without, one, other = (tensor_hashes(path) for path in files)
    changed = {name for name in without if without[name] != one[name]}
    assert changed == set(importance())
    assert one != other
    metadata = read_header(files[1]).metadata
    assert metadata["quantize.imatrix.file"] == "first.gguf"
    assert metadata["quantize.imatrix.dataset"] == "wiki.txt"
    assert metadata["quantize.imatrix.entries_count"] == 4
    assert metadata["quantize.imatrix.chunks_count"] == 7


def test_very_low_bit_types_need_it(model: Path, tmp_path: Path) -> None:
    imatrix = write_gguf_imatrix(tmp_path / "imatrix.gguf", importance())
    out = quantised(model, tmp_path / "out.gguf", "iq2_xs", imatrix)
    assert out.stat().st_size < model.stat().st_size / 8
    with pytest.raises(UsageError, match="--imatrix"):
        quantised(model, tmp_path / "x.gguf", "iq2_xs", None)
    del_one = {name: entry for name, entry in importance().items() if "up" not in name}
    partial = write_gguf_imatrix(tmp_path / "partial.gguf", del_one)
    with pytest.raises(MobileError, match=r"Missing importance matrix for tensor blk\.0\.ffn_up_exps"):
        quantised(model, tmp_path / "x.gguf", "iq2_xs", partial)


def test_one_of_another_model(model: Path, tmp_path: Path) -> None:
    names = {tensor.name for tensor in read_header(model).tensors}
    other = write_gguf_imatrix(tmp_path / "o.gguf", {"blk.9.x.weight": (np.ones((1, 4)), np.ones((1, 1)))})
    with pytest.raises(ModelFormatError, match="another one"):
        quantize.check_imatrix_fits(other, names)
    small = {name: (sums[:, :8], counts) for name, (sums, counts) in importance().items()}
    smaller = write_gguf_imatrix(tmp_path / "s.gguf", small)
    with pytest.raises(MobileError, match="imatrix size"):
        quantised(model, tmp_path / "x.gguf", "q4_k_m", smaller)


def test_damaged_gguf_imatrices(tmp_path: Path) -> None:
    cases = {
        "not finite": {"a.weight": (np.array([[np.nan, 1]]), np.ones((1, 1)))},
        "negative or not finite": {"a.weight": (np.array([[-1.0, 1]]), np.ones((1, 1)))},
        "counts that are not finite": {"a.weight": (np.ones((1, 2)), np.full((1, 1), np.inf))},
        "3 sums for 2 counts": {"a.weight": (np.ones((1, 3)), np.ones((2, 1)))},
        "no entries": {},
    }
    for said, entries in cases.items():
        path = write_gguf_imatrix(tmp_path / "bad.gguf", entries)
        with pytest.raises(ModelFormatError, match=said):
            read_imatrix(path)


def test_files_that_are_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_imatrix(tmp_path / "absent")
    with pytest.raises(ModelFormatError):
        read_imatrix(tmp_path)
    with pytest.raises(ModelFormatError, match="no entries"):
        read_imatrix(model)


LEGACY = legacy_bytes({"a.weight": (2, np.arange(6.0)), "b.weight": (1, np.arange(3.0))})


@settings(max_examples=300, deadline=None)
@given(
    cut=st.integers(0, len(LEGACY)),
    edits=st.lists(st.tuples(st.integers(0, len(LEGACY) - 1), st.integers(0, 255)), max_size=4),
    random=st.none() | st.binary(max_size=64),
)
def test_no_legacy_file_crashes(
    tmp_path_factory: pytest.TempPathFactory, cut: int, edits: list[tuple[int, int]], random: bytes | None
) -> None:
    data = bytearray(LEGACY)
    for place, value in edits:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.dat"
    path.write_bytes(bytes(data[:cut]) if random is None else random)
    try:
        matrix = read_imatrix(path)
    except ModelFormatError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert sum(values.nbytes for values in matrix.values.values()) <= len(data)
