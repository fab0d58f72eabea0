"""Statistics of routing against plain loops, and what of them a file gives back."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_files import GOOD, model_file, routing, statistics_for, write_statistics

from mobile_gguf.convert.calibrate.buddies import NO_EXPERT, Ranked, list_lengths
from mobile_gguf.convert.calibrate.imatrix_file import check_imatrix_target, write_imatrix
from mobile_gguf.convert.calibrate.importance import neuron_importance
from mobile_gguf.convert.calibrate.statistics import (
    MAX_BUDDIES,
    N_PERCENTILES,
    RouteCounts,
    Statistics,
    weight_entropy,
)
from mobile_gguf.convert.calibrate.store import read_statistics
from mobile_gguf.convert.gguf.file import GgufSource, update_gguf
from mobile_gguf.engine.observe import InputSums
from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.generate.passes.buddies import read_buddies
from mobile_gguf.gguf.info import read_gguf_info


def counted(ids: np.ndarray, weights: np.ndarray, n_expert: int, batches: int = 1) -> Statistics:
    counts = RouteCounts(tuple(range(len(ids))), n_expert, ids.shape[2])
    for part in np.array_split(np.arange(ids.shape[1]), batches):
        counts.add(ids[:, part], weights[:, part])
    return counts.statistics()


shapes = st.tuples(
    st.integers(0, 1000), st.integers(1, 3), st.integers(1, 40), st.integers(4, 24), st.integers(1, 4)
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 4))
def test_counts_are_those_of_plain_loops(shape, batches):
    ids, weights = routing(*shape)
    _, n_layer, n_tokens, n_expert, k = shape
    found = counted(ids, weights, n_expert, batches)
    for layer in range(n_layer):
        uses, mass = Counter[int](), dict.fromkeys(range(n_expert), 0.0)
        pairs: Counter[tuple[int, int]] = Counter()
        after: Counter[tuple[int, int]] = Counter()
        for token in range(n_tokens):
            for rank, i in enumerate(ids[layer, token].tolist()):
                uses[i] += 1
                mass[i] += float(weights[layer, token, rank])
                pairs.update((i, j) for j in ids[layer, token].tolist() if j != i)
                if layer + 1 < n_layer:
                    after.update((i, j) for j in ids[layer + 1, token].tolist())
        for i in range(n_expert):
            assert found.hotness[layer, i] == pytest.approx(uses[i] / n_tokens)
            assert found.weight[layer, i] == pytest.approx(mass[i] / max(uses[i], 1), rel=1e-5)
            together = sum(n for (a, _), n in pairs.items() if a == i)
            check_ranking(found.buddies, layer, i, {j: n / together for (a, j), n in pairs.items() if a == i})
            if layer + 1 < n_layer:
                next_ones = {j: n / uses[i] for (a, j), n in after.items() if a == i}
                check_ranking(found.transitions, layer, i, next_ones)
    assert found.hotness.sum(1) == pytest.approx(k)


def check_ranking(ranked: Ranked, row: int, expert: int, expected: dict[int, float]) -> None:
    """The largest shares first, equal ones by id, no more than there are."""
    best = sorted(expected.items(), key=lambda item: (-item[1], item[0]))[: ranked.expert.shape[-1]]
    ids, shares = ranked.expert[row, expert], ranked.share[row, expert]
    assert ids[: len(best)].tolist() == [j for j, _ in best]
    assert shares[: len(best)] == pytest.approx([share for _, share in best])
    assert (ids[len(best) :] == NO_EXPERT).all()
    assert not shares[len(best) :].any()


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.01, 1.0))
def test_a_buddy_list_is_the_shortest_that_reaches_alpha(shape, alpha):
    ids, weights = routing(*shape)
    buddies = counted(ids, weights, shape[3]).buddies
    lengths = list_lengths(buddies, alpha)
    for layer in range(shape[1]):
        for expert in range(shape[3]):
            length = lengths[layer, expert]
            listed = buddies.expert[layer, expert, :length].tolist()
            shares = buddies.share[layer, expert, :length].tolist()
            assert len(listed) == length <= MAX_BUDDIES
            assert not {expert, NO_EXPERT} & {*listed}
            there = (buddies.expert[layer, expert] != NO_EXPERT).sum()
            assert sum(shares) >= alpha - 1e-5 or length == there
            assert sum(shares[:-1]) < alpha


def test_entropies_are_percentiles_of_each_layer():
    ids, weights = routing(3, 2, 400, 6, 3)
    weights[1, ::2] = 0  # not routed
    found = counted(ids, weights, 6, batches=3).entropy
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    entropy = -(shares * np.log(np.maximum(shares, 1e-30))).sum(-1) / np.log(3)
    for layer, tokens in ((0, slice(None)), (1, slice(1, None, 2))):
        at = np.linspace(0, 100, N_PERCENTILES)
        expected = np.percentile(entropy[layer, tokens], at, method="lower")
        assert found[layer] == pytest.approx(expected, abs=0.001)
    assert (np.diff(found, axis=-1) >= 0).all()
    assert (counted(ids, np.ones_like(weights), 6).entropy == 1).all()
    assert (weight_entropy(np.array([[1, 0, 0]], np.float32)) == 0).all()


def test_the_engine_gets_buddies_of_what_was_written(tmp_path):
    """By the model's layers, cut at alpha, with each layer's own threshold; none without a calibration."""
    path = model_file(tmp_path / "m.gguf")
    assert read_buddies(read_gguf_info(path)) is None
    write_statistics(path, GOOD)
    found = read_buddies(read_gguf_info(path), alpha=0.7, percentile=20)
    assert found is not None
    lengths = list_lengths(GOOD.buddies, 0.7)
    assert (found.experts[0] == NO_EXPERT).all()  # a dense layer
    for row, layer in enumerate((1, 2)):
        for expert in range(6):
            n = lengths[row, expert]
            assert found.experts[layer, expert, :n].tolist() == GOOD.buddies.expert[row, expert, :n].tolist()
            assert (found.experts[layer, expert, n:] == NO_EXPERT).all()
            assert found.shares[layer, expert].tolist() == GOOD.buddies.share[row, expert].tolist()
    assert found.tau.tolist() == [1.0, *GOOD.entropy[:, 4].tolist()]
    update_gguf(path, drop=["mobile.entropy"])
    older = read_buddies(read_gguf_info(path))
    assert older is not None
    assert older.tau.tolist() == [1, 1, 1]  # an older calibration: never


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"mobile.buddies.expert": GOOD.buddies.expert[:1]}, "their shape is"),
        ({"mobile.buddies.expert": GOOD.buddies.expert + 1}, "name what cannot be"),
        ({"mobile.buddies.share": GOOD.buddies.share * np.nan}, "name what cannot be"),
        ({"mobile.buddies.share": GOOD.buddies.expert}, "has another type"),
        ({"mobile.entropy": GOOD.entropy[:1]}, "has the shape"),
    ],
)
def test_hostile_buddies_are_refused(tmp_path, tensors, reason):
    path = model_file(tmp_path / "m.gguf")
    write_statistics(path, GOOD)
    update_gguf(path, add_tensors=tensors)
    with pytest.raises(ModelFormatError, match=f"{reason}.*calibrate it again"):
        read_buddies(read_gguf_info(path))


def test_layers_that_do_not_run_and_few_experts():
    """A layer without routing has zeros, not another layer's numbers."""
    ids, weights = routing(3, 3, 20, 8, 2)
    ids[1] = -1
    found = counted(ids, weights, 8)
    assert not found.hotness[1].any()
    assert (found.buddies.expert[1] == NO_EXPERT).all()
    assert (found.transitions.expert == NO_EXPERT).all()
    assert found.hotness[2].sum() == pytest.approx(2)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (np.full((1, 3, 2), 8, np.int32), "expert 8 was routed to: this model has 8"),
        (np.zeros((2, 3, 2), np.int32), r"shape \(2, 3, 2\)"),
    ],
)
def test_impossible_routing_is_refused(ids, reason):
    with pytest.raises(UsageError, match=reason):
        RouteCounts((0,), 8, 2).add(ids, np.ones(ids.shape, np.float32))


def test_an_expert_twice_in_a_set_is_used_once():
    ids = np.full((1, 3, 2), 5, np.int32)
    found = counted(ids, np.ones(ids.shape, np.float32), 8)
    assert found.hotness[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_no_tokens_make_no_statistics():
    with pytest.raises(UsageError, match="nothing to make statistics of"):
        RouteCounts((0,), 8, 2).statistics()


# files


def assert_equal(found: Statistics | None, expected: Statistics) -> None:
    assert found is not None
    assert (found.n_tokens, found.n_expert, found.layers) == (
        expected.n_tokens,
        expected.n_expert,
        expected.layers,
    )
    for name in ("hotness", "weight", "entropy"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("buddies", "transitions"):
        np.testing.assert_array_equal(getattr(found, name).expert, getattr(expected, name).expert)
        np.testing.assert_array_equal(getattr(found, name).share, getattr(expected, name).share)
    assert found.importance.keys() == expected.importance.keys()
    for layer, values in expected.importance.items():
        np.testing.assert_array_equal(found.importance[layer], values)


@pytest.mark.parametrize("n_layer", [1, 2])
def test_a_file_gives_back_what_was_written(tmp_path, n_layer):
    path = model_file(tmp_path / "m.gguf", n_layer=n_layer)
    before = {tensor.name: b"".join(map(bytes, tensor.chunks())) for tensor in GgufSource.open(path).tensors}
    assert read_statistics(path) is None
    write_statistics(path, statistics_for(n_layer))
    assert_equal(read_statistics(path), statistics_for(n_layer))
    again = statistics_for(n_layer)
    write_statistics(path, Statistics(**{**vars(again), "importance": {}}))
    found = read_statistics(path)
    assert found is not None
    assert found.importance == {}  # an older calibration's is gone
    after = {tensor.name: b"".join(map(bytes, tensor.chunks())) for tensor in GgufSource.open(path).tensors}
    assert {name: after[name] for name in before} == before


def test_gguf_reads_the_tensors(tmp_path):
    import gguf

    path, expected = model_file(tmp_path / "m.gguf"), statistics_for()
    write_statistics(path, expected)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    np.testing.assert_array_equal(tensors["mobile.hotness"].data, expected.hotness)
    assert tensors["mobile.hotness"].shape.tolist() == [6, 2]
    np.testing.assert_array_equal(tensors["mobile.buddies.expert"].data, expected.buddies.expert)
    np.testing.assert_array_equal(tensors["mobile.importance.2"].data, expected.importance[2])
    assert reader.fields["mobile.statistics.n_tokens"].contents() == 50
    assert reader.fields["mobile.version"].contents() == 1


def test_another_models_statistics_are_refused(tmp_path):
    path = model_file(tmp_path / "m.gguf")
    for statistics in (statistics_for(1), statistics_for(2, 5)):
        write_statistics(path, statistics)
        with pytest.raises(ModelFormatError, match=r"mobile\.hotness .*wrong type or shape"):
            read_statistics(path)


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy.flat[-1] = value
    return copy


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        ({"mobile.hotness": GOOD.hotness[:1]}, {}, "mobile.hotness .*wrong type or shape"),
        ({"mobile.hotness": GOOD.hotness.astype(np.int32)}, {}, "mobile.hotness .*wrong type or shape"),
        ({"mobile.hotness": spoiled(GOOD.hotness, np.nan)}, {}, "mobile.hotness holds values"),
        ({"mobile.hotness": spoiled(GOOD.hotness, 1.5)}, {}, "mobile.hotness holds values"),
        ({"mobile.hotness": spoiled(GOOD.hotness, -0.1)}, {}, "mobile.hotness holds values"),
        ({"mobile.router_weight": GOOD.weight.T}, {}, "mobile.router_weight .*wrong type or shape"),
        ({"mobile.entropy": GOOD.entropy[:, ::-1]}, {}, "mobile.entropy does not ascend"),
        ({"mobile.entropy": spoiled(GOOD.entropy, 1.5)}, {}, "mobile.entropy holds values"),
        ({"mobile.entropy": GOOD.entropy[:, :5]}, {}, "mobile.entropy .*wrong type or shape"),
        ({"mobile.buddies.expert": spoiled(GOOD.buddies.expert, 6)}, {}, "an expert that is not there"),
        ({"mobile.buddies.expert": spoiled(GOOD.buddies.expert, -2)}, {}, "an expert that is not there"),
        ({"mobile.buddies.expert": np.zeros((2, 6, 7), np.int32)}, {}, "wrong shape"),
        ({"mobile.buddies.share": GOOD.buddies.share[:, :, ::-1]}, {}, "does not descend"),
        ({"mobile.transitions.share": GOOD.transitions.share[:, :3]}, {}, "wrong type or shape"),
        ({"mobile.importance.2": spoiled(GOOD.importance[2], np.inf)}, {}, "mobile.importance.2 holds"),
        ({"mobile.importance.1": GOOD.importance[1][:5]}, {}, "mobile.importance.1 .*wrong type or shape"),
        ({}, {"mobile.statistics.n_tokens": 0}, "n_tokens is 0"),
        ({}, {"mobile.statistics.n_tokens": "many"}, "n_tokens is 'many'"),
    ],
)
def test_hostile_statistics_are_refused(tmp_path, tensors, metadata, reason):
    path = model_file(tmp_path / "m.gguf")
    write_statistics(path, GOOD)
    update_gguf(path, set=metadata, add_tensors=tensors)
    with pytest.raises(ModelFormatError, match=f"{reason}.*calibrate it again"):
        read_statistics(path)


@pytest.mark.parametrize("missing", ["mobile.router_weight", "mobile.buddies.share", "mobile.transitions."])
def test_missing_tensors_are_refused(tmp_path, missing):
    path = model_file(tmp_path / "m.gguf")
    write_statistics(path, GOOD)
    update_gguf(path, drop=[missing])
    with pytest.raises(ModelFormatError, match="missing"):
        read_statistics(path)


@pytest.mark.parametrize("stacked", [True, False])
def test_importance_is_mean_square_times_column_norm(tmp_path, stacked):
    """Of the weights as they are in the file: stacked and quantised, or a tensor each."""
    import gguf

    path = model_file(tmp_path / "m.gguf", stacked=stacked)
    rng = np.random.default_rng(5)
    sums = InputSums(rng.random((6, 32), np.float32), np.array([4, 0, 1, 9, 2, 3]))
    with GgufSource.open(path) as source:
        found = neuron_importance(source, {"blk.1.ffn_down_exps.weight": sums})
    assert found.keys() == {1}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for expert in range(6):
        tensor = tensors["blk.1.ffn_down_exps.weight" if stacked else f"blk.1.ffn_down.{expert}.weight"]
        weights = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 4, 32)[
            expert if stacked else 0
        ]
        mean = sums.sum2[expert] / max(sums.counts[expert], 1)
        for neuron in range(32):
            expected = mean[neuron] * sum(float(w) ** 2 for w in weights[:, neuron])
            assert found[1][expert, neuron] == pytest.approx(expected, rel=1e-5)


def test_importance_of_another_model_is_refused(tmp_path):
    path = model_file(tmp_path / "m.gguf")
    for shape in ((6, 16), (5, 32)):
        sums = InputSums(np.ones(shape, np.float32), np.ones(shape[0], np.int64))
        with GgufSource.open(path) as source, pytest.raises(ModelFormatError, match="layer 1"):
            neuron_importance(source, {"blk.1.ffn_down_exps.weight": sums})


def test_an_imatrix_that_cannot_be_is_refused(tmp_path):
    path = tmp_path / "i.gguf"
    good = InputSums(np.ones((1, 4), np.float32), np.array([2]))
    bad = InputSums(np.full((1, 4), np.inf, np.float32), np.array([2]))
    cases: list[tuple[dict[str, InputSums], dict[str, Any], str]] = [
        ({"output.weight": good}, {}, "no inputs"),
        ({"blk.0.attn_q.weight": bad}, {}, "blk.0.attn_q.weight are not finite"),
        ({"blk.0." + "x" * 60 + ".weight": good}, {}, "too long a name"),
        ({"blk.0.attn_q.weight": good}, {"datasets": []}, "name of its text"),
        ({"blk.0.attn_q.weight": good}, {"chunk_size": 0}, "chunk size"),
    ]
    for inputs, options, reason in cases:
        with pytest.raises(UsageError, match=reason):
            write_imatrix(path, inputs, **{"datasets": ["a"], "chunk_size": 8, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_place_for_an_imatrix_is_checked_first(tmp_path):
    model = tmp_path / "m.gguf"
    model.touch()
    check_imatrix_target(tmp_path / "i.gguf", [model])
    for path, reason in [
        (tmp_path / "none" / "i.gguf", "there is no folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "." / "m.gguf", "is the model's file"),
    ]:
        with pytest.raises(UsageError, match=reason):
            check_imatrix_target(path, [model])


def test_a_copy_leaves_the_file_alone(tmp_path):
    path, out = model_file(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    shutil.copy(path, tmp_path / "before.gguf")
    write_statistics(path, GOOD, out=out)
    assert path.read_bytes() == (tmp_path / "before.gguf").read_bytes()
    assert_equal(read_statistics(out), GOOD)
