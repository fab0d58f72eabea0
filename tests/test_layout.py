"""Stacked to per-expert and back: every byte where docs/format.md says, and the stock file again at the end.

The `gguf` package reads both sides.
"""

import os
import re
import struct

import gguf
import layout_files
import numpy as np
import pytest
import tiny_models
from gguf_samples import N_EXPERT, N_FF, N_LAYER, contents, in_child, tensors, write_sample

from mobile_gguf.convert.gguf_file import GgufSource, update_gguf, write_gguf
from mobile_gguf.convert.hashes import differences, tensor_hashes
from mobile_gguf.convert.layout import plan_mobile, to_mobile, to_stacked
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
SINGLE = re.compile(r"blk\.(\d+)\.ffn_(gate_up|up|gate|down)\.(\d+)\.weight")
KINDS = ("gate_up", "up", "gate", "down")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("layout") / "sample.gguf")


def check_per_expert(path, n_segments=1):
    """The order and alignment of a per-expert file."""
    read = gguf.GGUFReader(path)
    assert read.fields["mobile.version"].contents() == 1
    assert read.fields["mobile.layout"].contents() == "per-expert"
    assert read.fields["general.alignment"].contents() == 4096
    assert all(tensor.data_offset % 4096 == 0 for tensor in read.tensors)
    offsets = [tensor.data_offset for tensor in read.tensors]
    assert offsets == sorted(offsets)
    singles = [match for tensor in read.tensors if (match := SINGLE.fullmatch(tensor.name))]
    assert [t.name for t in read.tensors][-len(singles) :] == [match[0] for match in singles]
    keys = [(int(match[1]), int(match[3]), KINDS.index(match[2])) for match in singles]
    assert keys == sorted(keys)
    assert path.stat().st_size % 4096 == 0
    return read


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


# segments


@pytest.mark.parametrize("n_segments", [1, 2])
@pytest.mark.parametrize("name", ["qwen3moe", "granitemoe-swa", "nemotron-h"])
def test_another_writer_makes_the_same_tensors(tmp_path, name, n_segments):
    theirs = layout_files.write_per_expert(tiny_models.path(name), tmp_path / "theirs.gguf", n_segments)
    to_mobile(tiny_models.path(name), tmp_path / "m.gguf", segments=n_segments, segment_order="natural")
    ours, expected = tensors(tmp_path / "m.gguf"), tensors(theirs)
    expected.pop("mobile.hotness")
    assert list(ours) == list(expected)
    assert all(np.array_equal(ours[key].data, expected[key].data) for key in expected)


def importance(seed, n_ff=N_FF):
    rng = np.random.default_rng(seed)
    return {f"mobile.importance.{n}": rng.random((N_EXPERT, n_ff), np.float32) for n in range(N_LAYER)}


def dequantized(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def expert_output(gate, up, down, x):
    hidden = gate @ x
    return down @ (hidden / (1 + np.exp(-hidden)) * (up @ x))


def matrices(read, layer, number):
    """gate, up and down of one piece."""
    merged = read.get(f"blk.{layer}.ffn_gate_up.{number}.weight")
    if merged is not None:
        gate, up = np.split(dequantized(merged), 2)
    else:
        gate, up = (dequantized(read[f"blk.{layer}.ffn_{kind}.{number}.weight"]) for kind in ("gate", "up"))
    return gate, up, dequantized(read[f"blk.{layer}.ffn_down.{number}.weight"])


@pytest.mark.parametrize(
    ("kind", "merged", "n_segments"),
    [("F32", False, 4), ("F16", True, 8), ("BF16", False, 2), ("Q8_0", False, 4), ("Q4_0", True, 2)],
)
@pytest.mark.parametrize("order", ["importance", "natural"])
def test_segments_add_up_to_the_expert(tmp_path, kind, merged, n_segments, order):
    n_ff = 128
    by_layer = importance(5, n_ff)
    source = write_sample(tmp_path / "a.gguf", kind=kind, merged=merged, n_ff=n_ff, n_tokens=4, more=by_layer)
    to_mobile(source, tmp_path / "one.gguf")
    to_mobile(source, tmp_path / "m.gguf", segments=n_segments, segment_order=order)
    fields = check_per_expert(tmp_path / "m.gguf").fields
    assert fields["mobile.segments"].contents() == n_segments
    assert fields["mobile.segments.order"].contents() == order
    whole, cut = tensors(tmp_path / "one.gguf"), tensors(tmp_path / "m.gguf")
    x = np.random.default_rng(1).normal(size=32).astype(np.float32)
    block = 32 if kind.startswith("Q") else 1
    width = n_ff // n_segments
    for layer in range(N_LAYER):
        stored = cut.get(f"mobile.segments.order.{layer}")
        assert (stored is None) == (order == "natural")
        for expert in range(N_EXPERT):
            pieces = [matrices(cut, layer, expert * n_segments + s) for s in range(n_segments)]
            assert all(down.shape == (32, width) for _, _, down in pieces)
            gate, up, down = matrices(whole, layer, expert)
            total = sum(expert_output(*piece, x) for piece in pieces)
            assert np.allclose(total, expert_output(gate, up, down, x), rtol=1e-4, atol=1e-4)
            means = by_layer[f"mobile.importance.{layer}"][expert].reshape(-1, block).mean(axis=1)
            neurons = np.arange(n_ff) if stored is None else stored.data[expert]
            if order == "importance":
                assert np.array_equal(np.sort(neurons), np.arange(n_ff))
                assert (np.diff(means[neurons[::block] // block]) <= 0).all()
            # no bit of a weight is another
            assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), gate[neurons])
            assert np.array_equal(np.concatenate([piece[1] for piece in pieces]), up[neurons])
            assert np.array_equal(np.concatenate([piece[2] for piece in pieces], axis=1), down[:, neurons])
    assert differences(source, tmp_path / "m.gguf") == []


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_segmented_file_goes_back_and_can_be_cut_anew(tmp_path, kind):
    source = write_sample(tmp_path / "a.gguf", kind=kind, n_ff=128, n_tokens=4)
    calibrated = update_gguf(source, add_tensors=importance(5, 128), out=tmp_path / "c.gguf")
    steps = [(4, "importance"), (2, "natural"), (2, "importance"), (1, "importance"), (4, "natural")]
    before = calibrated
    for number, (n_segments, order) in enumerate(steps):
        out = tmp_path / f"{number}.gguf"
        to_mobile(before, out, segments=n_segments, segment_order=order)
        check_per_expert(out)
        direct = to_mobile(
            calibrated, tmp_path / "direct.gguf", segments=n_segments, segment_order=order, force=True
        )
        ours = tensors(direct.path)
        assert {n: t.data.tobytes() for n, t in tensors(out).items()} == {
            n: t.data.tobytes() for n, t in ours.items()
        }
        to_stacked(out, tmp_path / "back.gguf", force=True)
        assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()
        before = out


def test_equal_importance_keeps_the_order(tmp_path):
    flat = {f"mobile.importance.{n}": np.ones((N_EXPERT, N_FF), np.float32) for n in range(N_LAYER)}
    source = write_sample(tmp_path / "a.gguf", more=flat)
    to_mobile(source, tmp_path / "m.gguf", segments=2)
    order = tensors(tmp_path / "m.gguf")["mobile.segments.order.0"].data
    assert np.array_equal(order, np.broadcast_to(np.arange(N_FF), (N_EXPERT, N_FF)))


@pytest.mark.parametrize(
    ("kind", "n_segments", "legal"), [("F32", 3, "2, 4, 8, 16, 32, 64"), ("Q8_0", 4, "2")]
)
def test_segments_that_cannot_be(tmp_path, kind, n_segments, legal):
    source = write_sample(tmp_path / "a.gguf", kind=kind)
    with pytest.raises(UsageError, match=f"{n_segments} segments: .* 64 neurons.* segments: {legal}$"):
        to_mobile(source, tmp_path / "m.gguf", segments=n_segments)


def test_segments_and_biases_exclude_each_other(tmp_path):
    source = write_sample(
        tmp_path / "a.gguf", more={"blk.1.ffn_up_exps.bias": np.zeros((N_EXPERT, N_FF), np.float32)}
    )
    with pytest.raises(UsageError, match=r"biases or scales \(blk\.1\.ffn_up_exps\.bias\)"):
        to_mobile(source, tmp_path / "m.gguf", segments=2, segment_order="natural")
    to_mobile(source, tmp_path / "m.gguf")
    assert differences(source, tmp_path / "m.gguf") == []


def test_segments_need_importance(tmp_path, sample):
    with pytest.raises(
        UsageError, match=r"mobile\.importance\.0 is missing.* calibrate .*--segment-order natural"
    ):
        to_mobile(sample, tmp_path / "m.gguf", segments=2)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((N_EXPERT, N_FF), np.nan), "no numbers"),
        (np.zeros((N_FF, N_EXPERT)), r"is \(4, 64\), not \(64, 4\)"),
    ],
)
def test_importance_that_cannot_be_used(tmp_path, sample, array, words):
    wrong = importance(5) | {"mobile.importance.1": array}
    update_gguf(sample, add_tensors=wrong, out=tmp_path / "c.gguf")
    with pytest.raises(ModelFormatError, match=words):
        to_mobile(tmp_path / "c.gguf", tmp_path / "m.gguf", segments=2)


@pytest.mark.parametrize(
    ("kind", "order", "words"),
    [
        ("F32", np.zeros((N_EXPERT, N_FF), int), "no order of 64 neurons"),
        ("F32", np.full((N_EXPERT, N_FF), -1), "no order of 64 neurons"),
        ("F32", np.zeros((N_FF,), int), "is not I32"),
        ("Q8_0", np.tile(np.roll(np.arange(N_FF), 1), (N_EXPERT, 1)), "cuts through blocks of 32 neurons"),
    ],
)
def test_a_stored_order_that_is_none(tmp_path, kind, order, words):
    source = write_sample(tmp_path / "a.gguf", kind=kind, more=importance(5))
    to_mobile(source, tmp_path / "m.gguf", segments=2)
    update_gguf(tmp_path / "m.gguf", add_tensors={"mobile.segments.order.1": order})
    with pytest.raises(ModelFormatError, match=words):
        to_stacked(tmp_path / "m.gguf", tmp_path / "s.gguf")


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
    assert found["token_embd.weight"] == "type 0 (32, 100) against type 1 (32, 100)"


# memory

_MEASURED = """
import sys
from pathlib import Path
from mobile_gguf.convert.layout import to_mobile, to_stacked

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
    source = write_sample(tmp_path / "a.gguf", n_expert=2048, n_ff=8, n_tokens=4)
    with GgufSource.open(source) as opened:
        assert len(plan_mobile(opened, 2, "natural").tensors) == 2 * 2048 * 3 * 2 + 5
