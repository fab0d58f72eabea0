"""Experts cut into segments: the same weights in another order, which add up to the expert and go back whole.

The ``gguf`` package reads both sides.
"""

import gguf
import layout_files
import numpy as np
import pytest
import tiny_models
from gguf_samples import N_EXPERT, N_FF, N_LAYER, tensors, write_sample
from layout_files import check_per_expert

from mobile_gguf.convert.gguf.file import update_gguf
from mobile_gguf.convert.gguf.hashes import differences
from mobile_gguf.convert.gguf.layout import to_mobile, to_stacked
from mobile_gguf.errors import ModelFormatError, UsageError


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("segments") / "sample.gguf")


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
