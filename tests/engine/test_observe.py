"""What the engine observes while it runs, held against Transformers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import by_hand
import engine_libs
import numpy as np
import pytest
import tiny_models
from engine_jobs import tokens
from places import SUPPORT
from statistics_files import write_statistics

from mobile_gguf.api.loading import open_backend
from mobile_gguf.convert.calibrate.collect import collect
from mobile_gguf.convert.calibrate.imatrix_file import write_imatrix
from mobile_gguf.convert.calibrate.store import read_statistics
from mobile_gguf.convert.gguf.layout import to_mobile
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.observe import (
    INPUTS,
    LITTLE,
    NEURONS,
    ROUTES,
    Observation,
)
from mobile_gguf.errors import EngineError, ModelFormatError, UsageError
from mobile_gguf.gguf.header import read_header
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import Size

NAME = "qwen3moe"
TEXT = tokens(48, 5)
# keys and values are kept in half precision here, and not in Transformers
CLOSE: dict[str, Any] = {"rtol": 5e-3, "atol": 1e-4}


@pytest.fixture(scope="module", autouse=True)
def engine():
    """The installed engine; without it these tests are skipped."""
    engine_libs.engine_lib()
    found = find_engine()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    tiny_models.path(NAME)
    out = tmp_path_factory.mktemp("oracle") / "oracle.npz"
    job = {"spec": asdict(tiny_models.MODELS[NAME]), "tokens": TEXT, "out": str(out)}
    script = SUPPORT / "observe_oracle.py"
    subprocess.run([sys.executable, str(script)], input=json.dumps(job), text=True, check=True)
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def backend(engine):
    info = read_gguf_info(tiny_models.path(NAME))
    options = LoadOptions(ram_budget=Size(fraction=0.4), n_ctx=64, threads=1, threads_batch=1)
    llama, _ = open_backend(info, options)
    yield llama
    llama.close()


@pytest.mark.parametrize(("share", "batches"), [(1.0, [48]), (0.4, [48]), (0.4, [20, 20, 8])])
def test_sums_and_routes_are_those_of_transformers(oracle, monkeypatch, share, batches):
    """Of every weight: dense, router, experts, output; all experts or a store, one batch or several."""
    if len(batches) > 1:
        monkeypatch.setattr("mobile_gguf.convert.calibrate.collect._MAX_BATCH", batches[0])
    budget = Size(fraction=share)
    statistics = collect(tiny_models.path(NAME), [TEXT], ram_budget=budget, threads=1, inputs=True)
    names = {name.split("/")[0] for name in oracle if name.endswith("/counts")}
    assert statistics.inputs.keys() == names
    for name in names:
        sums = statistics.inputs[name]
        np.testing.assert_array_equal(sums.counts, oracle[f"{name}/counts"], name)
        np.testing.assert_allclose(sums.sum2, oracle[name], err_msg=name, **CLOSE)
    n_expert, n_layer = statistics.n_expert, len(statistics.layers)
    assert statistics.n_tokens == len(TEXT)
    for row, layer in enumerate(statistics.layers):
        ids, weights = oracle[f"ids/{layer}"], oracle[f"weights/{layer}"]
        uses = np.bincount(ids.ravel(), minlength=n_expert)
        np.testing.assert_allclose(statistics.hotness[row], uses / len(TEXT), rtol=1e-6)
        mean = np.bincount(ids.ravel(), weights.ravel(), n_expert) / np.maximum(uses, 1)
        np.testing.assert_allclose(statistics.weight[row], mean, rtol=1e-3)
        counts = np.maximum(oracle[f"blk.{layer}.ffn_down_exps.weight/counts"], 1)[:, None]
        expected = oracle[f"blk.{layer}.ffn_down_exps.weight"] / counts * oracle[f"norms/{layer}"]
        np.testing.assert_allclose(statistics.importance[layer], expected, **CLOSE)
    assert statistics.importance.keys() == set(range(n_layer))


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_segments_have_the_statistics_of_whole_experts(tmp_path: Path, share: float):
    """Experts cut up by their calibrated importance: the same routing, and neurons named as before."""
    path, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    whole = collect(tiny_models.path(NAME), [TEXT], threads=1)
    write_statistics(tiny_models.path(NAME), whole, out=path)
    to_mobile(path, cut, segments=4, segment_order="importance")
    found = collect(cut, [TEXT], ram_budget=Size(fraction=share), threads=1)
    np.testing.assert_array_equal(found.hotness, whole.hotness)
    np.testing.assert_allclose(found.weight, whole.weight, rtol=1e-3)
    np.testing.assert_array_equal(found.transitions.expert, whole.transitions.expert)
    for layer, values in whole.importance.items():
        np.testing.assert_allclose(found.importance[layer], values, **CLOSE)
    write_statistics(cut, found)
    assert read_statistics(cut) is not None


@pytest.mark.parametrize("name", ["gpt-oss", "llama4", "deepseek2", "granitemoe-swa", "gemma4", "nemotron-h"])
def test_other_families_are_observed(name):
    """Merged gate and up, weights before the experts, layers without any, hybrids: all tokens are counted."""
    spec = tiny_models.MODELS[name]
    text = [tokens(20, 1), tokens(13, 2)]
    statistics = collect(tiny_models.path(name), text, threads=1)
    assert (statistics.n_tokens, len(statistics.layers)) == (33, spec.n_layer_moe)
    np.testing.assert_allclose(statistics.hotness.sum(1), spec.top_k, rtol=1e-5)
    assert statistics.importance.keys() == set(statistics.layers)
    for row, layer in enumerate(statistics.layers):
        seen = (statistics.importance[layer] > 0).any(1)
        np.testing.assert_array_equal(seen, statistics.hotness[row] > 0)


def test_what_is_asked_for_is_observed(backend, engine):
    down = {f"blk.{layer}.ffn_down_exps.weight" for layer in range(4)}
    for what, names in [(ROUTES, set()), (NEURONS, down), (ROUTES | NEURONS, down)]:
        with Observation(engine, backend.ctx, what) as observation:
            decode(backend, TEXT[:8])
            assert observation.inputs().keys() == names
            routes = observation.take_routes()
            assert observation.take_routes() == []
        if what & ROUTES:
            assert [route.layer for route in routes] == [0, 1, 2, 3]
            # the last layer computes only tokens with an output
            assert [len(route.ids) for route in routes] == [8, 8, 8, 1]
        else:
            assert routes == []


def test_observing_changes_no_outputs(backend, engine):
    """Before, during and after, with a graph that is used again while the callback comes and goes."""
    before = decode(backend, TEXT[:8])
    with Observation(engine, backend.ctx, ROUTES | INPUTS) as observation:
        during = decode(backend, TEXT[:8])
        assert len(observation.take_routes()) == 4
    after = decode(backend, TEXT[:8])
    np.testing.assert_array_equal(during, before)
    np.testing.assert_array_equal(after, before)


def test_skipped_experts_are_not_counted(backend, engine):
    with Observation(engine, backend.ctx, ROUTES | NEURONS) as observation:
        engine.set_n_expert_used(backend.ctx, 2)
        try:
            decode(backend, TEXT[:8])
        finally:
            engine.set_n_expert_used(backend.ctx, 0)
        routes, inputs = observation.take_routes(), observation.inputs()
    assert (routes[0].ids[:, 2:] == -1).all()
    assert (routes[0].ids[:, :2] >= 0).all()
    assert inputs["blk.0.ffn_down_exps.weight"].counts.sum() == 8 * 2


def test_observed_routes_are_those_of_the_trace(backend, engine, tmp_path: Path):
    """The engine's own record, written where the experts are asked for: same ids, same weights."""
    trace = tmp_path / "trace.csv"
    engine.checked("trace_start", "starting the trace", backend.ctx, str(trace).encode())
    with Observation(engine, backend.ctx, ROUTES) as observation:
        decode(backend, TEXT)
        routes = observation.take_routes()
    engine.checked("trace_stop", "writing the trace", backend.ctx)
    with open(trace, newline="") as file:
        rows = [(int(r["layer"]), int(r["expert"]), float(r["weight"])) for r in csv.DictReader(file)]
    observed = [
        (route.layer, expert, weight)
        for route in routes
        for expert, weight in zip(route.ids.ravel().tolist(), route.weights.ravel().tolist(), strict=True)
    ]
    assert [row[:2] for row in observed] == [row[:2] for row in rows]
    np.testing.assert_allclose([row[2] for row in observed], [row[2] for row in rows], rtol=1e-4)


def test_a_context_is_observed_once(backend, engine):
    with Observation(engine, backend.ctx, ROUTES):
        with pytest.raises(EngineError, match="observed already"), Observation(engine, backend.ctx, ROUTES):
            pass
        decode(backend, TEXT[:4])
    with pytest.raises(EngineError, match="not observed"):
        Observation(engine, backend.ctx, ROUTES).inputs()
    for what in (0, 16, -1):
        with pytest.raises(UsageError, match="what to observe"), Observation(engine, backend.ctx, what):
            pass
    refused = {(): "a way of having fewer", ((4, 0),): "1 to 3 experts", ((2, -1),): "negative"}
    for ways, says in refused.items():
        with pytest.raises(UsageError, match=says), Observation(engine, backend.ctx, LITTLE, ways):
            pass
    with pytest.raises(EngineError, match="not observed"):
        Observation(engine, backend.ctx, LITTLE).little()


def decode(llama: Any, text: list[int]) -> np.ndarray:
    """Runs text from an empty context; returns the last token's logits."""
    llama.forget()
    by_hand.run(llama, text)
    return llama.last_logits().copy()


def test_an_imatrix_file_is_as_llama_cpp_writes_it(tmp_path: Path):
    """common/imatrix-loader.cpp: F32 sums and counts in pairs, and the three keys of an imatrix."""
    import gguf

    path = tiny_models.path(NAME)
    statistics = collect(path, [TEXT], threads=1, neurons=False, inputs=True)
    out = tmp_path / "imatrix.gguf"
    write_imatrix(out, statistics.inputs, datasets=["a text"], chunk_size=16)
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a text"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 16
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert "output.weight.in_sum2" not in stored
    for name, sums in statistics.inputs.items():
        if name != "output.weight":
            np.testing.assert_array_equal(stored[f"{name}.in_sum2"], sums.sum2)
            np.testing.assert_array_equal(stored[f"{name}.counts"], sums.counts[:, None])


def test_nothing_to_collect(demo_gguf: Path):
    with pytest.raises(UsageError, match="no experts"):
        collect(tiny_models.path("dense"), [TEXT])
    with pytest.raises(UsageError, match="no text"):
        collect(demo_gguf, [[], []])


def test_infinite_activations_are_refused(tmp_path: Path):
    """A weight that overflows gives an error that names where, not statistics of nothing."""
    path = tmp_path / "broken.gguf"
    data = bytearray(tiny_models.path(NAME).read_bytes())
    header = read_header(tiny_models.path(NAME))
    norm = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_norm.weight")
    start = header.data_start + norm.offset
    data[start : start + norm.n_bytes] = np.full(norm.n_bytes // 4, 3e38, "<f4").tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"inputs of blk\.1\..* are not finite"):
        collect(path, [TEXT[:8]], threads=1)
