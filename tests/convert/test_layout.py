"""Stacked to per-expert and back: every byte where docs/format.md says, and the stock file again at the end.

The ``gguf`` package reads both sides.
"""

import os
import re
import struct

import gguf
import numpy as np
import pytest
import tiny_models
from gguf_samples import N_FF, contents, in_child, tensors, write_sample
from layout_files import SINGLE, check_per_expert

from mobile_gguf.convert.gguf.file import GgufSource, update_gguf, write_gguf
from mobile_gguf.convert.gguf.hashes import differences, tensor_hashes
from mobile_gguf.convert.gguf.layout import plan_mobile, to_mobile, to_stacked
from mobile_gguf.errors import ModelFormatError, UsageError

# by what the experts are; where the down matrix's type differs the file is named after the preset
TINY = {
    "f32": "qwen3moe",
    "f16": "phimoe-f16",
    "bf16": "olmoe-bf16",
    "q8_0": "qwen2moe-q8_0",
    "q4_0": "qwen3moe-q4_0",
    "q4_k_m": "qwen3moe-q4_k",
    "iq4_nl": "qwen3moe-iq4_nl",
    "mxfp4": "gpt-oss-mxfp4",
    "merged": "granitemoe-swa",
    "without gate": "nemotron-h",
    "scales": "qwen3moe-scales",
    "split": "mixtral-split",
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("layout") / "sample.gguf")


@pytest.mark.parametrize("name", list(TINY))
def test_round_trip(tmp_path, name):
    source, mobile, back = tiny_models.path(TINY[name]), tmp_path / "m.gguf", tmp_path / "s.gguf"
    result = to_mobile(source, mobile)
    read = check_per_expert(mobile)
    assert (result.n_tensors, result.n_bytes) == (len(read.tensors), mobile.stat().st_size)
    stock = {t.name: t for part in source.parent.glob("*.gguf") for t in gguf.GGUFReader(part).tensors}
    n_experts = 0
    for tensor in read.tensors:
        match = SINGLE.fullmatch(tensor.name)
        if match is None:
            assert np.array_equal(tensor.data, stock.pop(tensor.name).data)
            continue
        stacked = stock[f"blk.{match[1]}.ffn_{match[2]}_exps.weight"]
        assert tensor.tensor_type == stacked.tensor_type
        assert np.array_equal(tensor.data, stacked.data[int(match[3])])
        n_experts += 1
    assert n_experts == sum(len(tensor.data) for tensor in stock.values())
    before, after = contents(source), contents(mobile)
    after.pop("general.alignment")
    assert {k: v for k, v in before.items() if not k.startswith("split.")} == after

    assert differences(source, mobile) == []
    to_stacked(mobile, back)
    assert differences(source, back) == []
    if name == "split":
        assert contents(back, ours=True) == after
    else:
        assert back.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("alignment", [0, 32, 256])
def test_the_stock_file_comes_back_whole(tmp_path, alignment):
    source = write_sample(tmp_path / "a.gguf", alignment=alignment)
    to_mobile(source, tmp_path / "m.gguf")
    update_gguf(
        tmp_path / "m.gguf", set={"mobile.note": "x"}, add_tensors={"mobile.hotness": np.ones((2, 3))}
    )
    check_per_expert(tmp_path / "m.gguf")
    to_stacked(tmp_path / "m.gguf", tmp_path / "s.gguf")
    assert (tmp_path / "s.gguf").read_bytes() == source.read_bytes()


def test_tensors_of_ours_anywhere_do_not_disturb_the_order(tmp_path, sample):
    more = {"mobile.hotness": np.ones((2, 3))}
    update_gguf(sample, add_tensors=more, out=tmp_path / "c.gguf")
    rewritten(tmp_path / "c.gguf", tmp_path / "front.gguf", lambda all_: [all_[-1], *all_[:-1]])
    to_mobile(tmp_path / "front.gguf", tmp_path / "m.gguf")
    to_stacked(tmp_path / "m.gguf", tmp_path / "s.gguf")
    assert (tmp_path / "s.gguf").read_bytes() == sample.read_bytes()
    to_stacked(tmp_path / "front.gguf", tmp_path / "s2.gguf")
    assert (tmp_path / "s2.gguf").read_bytes() == sample.read_bytes()


def test_stacked_with_our_metadata(tmp_path, sample):
    to_mobile(sample, tmp_path / "m.gguf")
    update_gguf(
        tmp_path / "m.gguf", set={"mobile.note": "x"}, add_tensors={"mobile.hotness": np.ones((2, 3))}
    )
    to_stacked(tmp_path / "m.gguf", tmp_path / "s.gguf", keep_mobile=True)
    ours = {key for key in contents(tmp_path / "s.gguf", ours=True) if key.startswith("mobile.")}
    assert ours == {"mobile.note", "mobile.version"}
    assert list(tensors(tmp_path / "s.gguf")) == [*tensors(sample), "mobile.hotness"]
    to_stacked(tmp_path / "s.gguf", tmp_path / "stock.gguf")
    assert (tmp_path / "stock.gguf").read_bytes() == sample.read_bytes()


# what cannot be done


def test_there_is_nothing_to_do(tmp_path, sample):
    to_mobile(sample, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="per-expert layout already"):
        to_mobile(tmp_path / "m.gguf", tmp_path / "n.gguf")
    to_mobile(tmp_path / "m.gguf", tmp_path / "s2.gguf", segments=2, segment_order="natural")
    with pytest.raises(UsageError, match="with 2 segments in natural order already"):
        to_mobile(tmp_path / "s2.gguf", tmp_path / "n.gguf", segments=2, segment_order="natural")
    with pytest.raises(UsageError, match="is a stacked file already"):
        to_stacked(sample, tmp_path / "n.gguf")


def test_an_output_that_is_there(tmp_path, sample):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"exists: .*--force"):
        to_mobile(sample, out)
    assert out.read_bytes() == b"mine"
    to_mobile(sample, out, force=True)
    with pytest.raises(UsageError, match="directory"):
        to_mobile(sample, tmp_path)
    with pytest.raises(UsageError, match="is the file that is read"):
        to_mobile(sample, sample, force=True)


def test_a_dry_run_writes_nothing(tmp_path, sample):
    planned = to_mobile(sample, tmp_path / "m.gguf", dry_run=True)
    assert os.listdir(tmp_path) == []
    written = to_mobile(sample, tmp_path / "m.gguf")
    assert (planned.n_bytes, planned.n_tensors) == (written.n_bytes, written.n_tensors)
    assert planned.n_bytes == (tmp_path / "m.gguf").stat().st_size


def test_a_dense_model(tmp_path):
    source = write_sample(tmp_path / "a.gguf", moe=False)
    with pytest.raises(ModelFormatError, match="dense model"):
        to_mobile(source, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize("missing", ["up", "down"])
def test_a_matrix_is_missing(tmp_path, missing):
    source = write_sample(tmp_path / "a.gguf", skip=f"blk.1.ffn_{missing}_exps.weight")
    with pytest.raises(ModelFormatError, match=r"layer 1 have the matrices .*: some are missing"):
        to_mobile(source, tmp_path / "m.gguf")


def rewritten(source, out, change):
    """A copy of a per-expert file with other tensors."""
    with GgufSource.open(source) as opened:
        write_gguf(out, opened.kv, change(list(opened.tensors)), opened.alignment)
    return out


def test_an_expert_is_missing(tmp_path, sample):
    to_mobile(sample, tmp_path / "m.gguf")
    gone = "blk.1.ffn_up.2.weight"
    rewritten(tmp_path / "m.gguf", tmp_path / "n.gguf", lambda all_: [t for t in all_ if t.name != gone])
    with pytest.raises(ModelFormatError, match="the up matrices of layer 1 lack expert 2"):
        to_stacked(tmp_path / "n.gguf", tmp_path / "s.gguf")


def test_the_last_expert_is_missing(tmp_path, sample):
    to_mobile(sample, tmp_path / "m.gguf")
    last = re.compile(r"blk\.1\.ffn_\w+\.3\.weight")
    rewritten(
        tmp_path / "m.gguf", tmp_path / "n.gguf", lambda all_: [t for t in all_ if not last.fullmatch(t.name)]
    )
    with pytest.raises(ModelFormatError, match="layer 1 has 3 experts, expert_count says 4"):
        to_stacked(tmp_path / "n.gguf", tmp_path / "s.gguf")


def test_experts_that_differ(tmp_path, sample):
    to_mobile(sample, tmp_path / "m.gguf")
    small = gguf.GGUFReader(tmp_path / "m.gguf")
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    name = b"blk.0.ffn_up.1.weight"
    shape = raw.index(name) + len(name) + 4
    raw[shape : shape + 16] = struct.pack("<QQ", N_FF, 32)
    (tmp_path / "n.gguf").write_bytes(raw)
    assert len(small.tensors)
    with pytest.raises(ModelFormatError, match=r"differ in type or shape: blk\.0\.ffn_up\.0"):
        to_stacked(tmp_path / "n.gguf", tmp_path / "s.gguf")


def test_an_unknown_type(tmp_path, sample):
    raw = bytearray(sample.read_bytes())
    name = b"blk.0.ffn_up_exps.weight"
    kind = raw.index(name) + len(name) + 4 + 3 * 8
    raw[kind : kind + 4] = struct.pack("<I", 999)
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(ModelFormatError, match=r"blk\.0\.ffn_up_exps\.weight has the unknown type 999"):
        to_mobile(tmp_path / "a.gguf", tmp_path / "m.gguf")


def test_too_many_pieces_for_the_engine(tmp_path):
    source = write_sample(tmp_path / "a.gguf", n_expert=1024, n_ff=8, n_tokens=4)
    with pytest.raises(UsageError, match="8192 pieces in a layer are more than the 4096"):
        to_mobile(source, tmp_path / "m.gguf", segments=8, segment_order="natural")


# hashes


def test_hashes_find_one_bit(tmp_path, sample):
    to_mobile(sample, tmp_path / "m.gguf")
    tensor = tensors(tmp_path / "m.gguf")["blk.1.ffn_gate.2.weight"]
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    raw[tensor.data_offset + 77] ^= 1
    (tmp_path / "n.gguf").write_bytes(raw)
    assert differences(sample, tmp_path / "n.gguf") == ["blk.1.ffn_gate_exps.weight: other bytes"]


def test_hashes_are_of_the_stacked_tensors(tmp_path, sample):
    import hashlib

    to_mobile(sample, tmp_path / "m.gguf", segments=2, segment_order="natural")
    expected = {n: hashlib.sha256(t.data.tobytes()).hexdigest() for n, t in tensors(sample).items()}
    assert {n: found.sha256 for n, found in tensor_hashes(tmp_path / "m.gguf").items()} == expected


def test_differences_in_kind(tmp_path, sample):
    other = write_sample(tmp_path / "o.gguf", kind="F16", skip="blk.0.attn_norm.weight")
    found = dict(line.split(": ", 1) for line in differences(sample, other))
    assert found["blk.0.attn_norm.weight"] == f"only in {sample}"
    assert found["token_embd.weight"] == "type 0 (32, 5000) against type 1 (32, 5000)"


# memory

_MEASURED = """
import sys
from pathlib import Path
from mobile_gguf.convert.gguf.layout import to_mobile, to_stacked

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

before = peak()
source, out = Path(sys.argv[1]), Path(sys.argv[2])
to_mobile(source, out, segments=int(sys.argv[3]), segment_order="natural")
to_stacked(out, source, force=True)
print(peak() - before)
"""


@pytest.mark.parametrize("n_segments", [1, 4])
def test_memory_does_not_depend_on_the_tensors(tmp_path, n_segments):
    # 4 experts of 3 x 16 MiB in stacks of 64 MiB: a stack held whole would show, what is held is a segment
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    for kind, shape in (("gate", (4, 4096, 2048)), ("up", (4, 4096, 2048)), ("down", (4, 2048, 4096))):
        writer.add_tensor_info(f"blk.0.ffn_{kind}_exps.weight", shape, np.dtype(np.float16), 64 << 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + (192 << 20))
    done = in_child(_MEASURED, path, tmp_path / "m.gguf", n_segments)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 << 20


def test_planning_many_experts_takes_little_memory(tmp_path):
    source = write_sample(tmp_path / "a.gguf", n_expert=1024, n_ff=8, n_tokens=4)
    with GgufSource.open(source) as opened:
        assert len(plan_mobile(opened, 2, "natural").tensors) == 2 * 1024 * 3 * 2 + 5
