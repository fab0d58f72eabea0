"""Traces, the shape of the benchmark model, and that the model written routes as the trace says."""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_model import TINY, TINY_TRACE

from mobile_gguf.bench import build
from mobile_gguf.bench.arm import Arm, Runner, text_of
from mobile_gguf.bench.build import ensure_model, model_path, random_blocks, router_logits, router_matrix
from mobile_gguf.bench.geometry import HEAD_SIZE, scale_model
from mobile_gguf.bench.routing import compare_routing
from mobile_gguf.bench.synthetic import synthesise_trace
from mobile_gguf.bench.trace import Trace, TraceError, read_trace
from mobile_gguf.errors import EngineError, MobileError, UsageError
from mobile_gguf.sizes import GIB, MIB

HEADER = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
GEOMETRY = "# route_trace v1\n# model=m.gguf arch=qwen3moe n_layer=2 n_expert=8 n_expert_used=2\n"
# a prompt of two steps, whose last layer was computed for the second only, and one decoded step
ROWS = """\
0,0,0,0,0,3,0.75,0,100
0,0,0,0,1,5,0.25,0,100
0,0,1,0,0,5,0.6,0,0
0,0,1,0,1,1,0.4,0,100
0,0,1,1,0,7,0.5,0,100
0,0,1,1,1,0,0.5,0,100
0,1,2,0,0,1,0.9,0,0
0,1,2,0,1,2,0.1,0,100
0,1,2,1,0,0,0.8,0,0
0,1,2,1,1,6,0.2,0,100
"""


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["small.route.csv", "small.route.csv.gz"])
def test_trace_is_read(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path / name, GEOMETRY + HEADER + ROWS))
    assert (trace.name, trace.n_steps, trace.n_layer, trace.k, trace.n_expert) == ("small", 3, 2, 2, 8)
    assert (trace.n_prompt, trace.n_decode) == (2, 1)
    assert trace.experts.tolist() == [[[3, 5], [-1, -1]], [[5, 1], [7, 0]], [[1, 2], [0, 6]]]
    assert trace.weights[2, 1].tolist() == pytest.approx([0.8, 0.2])


def test_trace_without_geometry_takes_it_from_the_rows(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.csv", HEADER + ROWS))
    assert (trace.n_layer, trace.k, trace.n_expert) == (2, 2, 8)


def test_trace_is_cut() -> None:
    trace = synthesise_trace(n_layer=2, n_expert=8, k=2, n_prompt=3, n_decode=5)
    assert (trace.first(4).n_steps, trace.first(4).n_decode, trace.first(99).n_steps) == (4, 1, 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "no column phase, step, layer, slot, expert, weight"),
        (HEADER, "holds no routed experts"),
        (HEADER + "0,0,0,0,0,x,0.5,0,0\n", "row 1 is damaged"),
        (HEADER + "0,0,0,0,0\n", "row 1 is damaged"),
        (HEADER + "0,0,0,0,0,-3,0.5,0,0\n", "a negative expert"),
        (HEADER + "0,0,0,0,1,3,0.5,0,0\n", "step 0, layer 0 does not have its 2 experts just once"),
        (HEADER + "0,0,0,0,0,3,0.5,0,0\n" * 2, "does not have its 1 experts just once"),
        (HEADER + "0,0,0,0,0,3,0.5,0,0\n0,0,0,0,1,3,0.5,0,0\n", "twice to one expert"),
        (HEADER + "0,1,0,0,0,3,1,0,0\n0,0,1,0,0,3,1,0,0\n", "prompt steps after the first decoded one"),
        ("# n_expert=4\n" + HEADER + ROWS, "its header says n_expert=4, its rows go up to 8"),
    ],
)
def test_damaged_traces_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(TraceError, match=r"t\.csv") as caught:
        read_trace(path)
    assert says in str(caught.value)


def test_missing_and_truncated_trace_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no trace at"):
        read_trace(tmp_path / "none.csv.gz")
    whole = gzip.compress((HEADER + ROWS * 50).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="cannot read the trace"):
        read_trace(tmp_path / "cut.csv.gz")


@given(
    size=st.integers(300 * MIB, 64 * GIB),
    n_layer=st.integers(1, 64),
    n_expert=st.sampled_from([8, 32, 128]),
    n_steps=st.integers(1, 1500),
)
@settings(max_examples=200, deadline=None)
def test_scaled_model_comes_near_its_size(size: int, n_layer: int, n_expert: int, n_steps: int) -> None:
    shape_only = np.zeros((n_steps, n_layer, 2), dtype=np.int32)
    trace = Trace("t", shape_only, shape_only.astype(np.float32), n_expert, 1, "t")
    try:
        shape = scale_model(trace, size)
    except UsageError as error:
        assert "ask for at least" in str(error)  # noqa: PT017
        assert size < 2 * n_layer * n_expert * 3 * 18 * 1536
        return
    assert shape.n_embd >= max(512, n_steps)
    assert shape.n_embd % 256 == shape.n_ff % 32 == 0
    assert shape.n_head % shape.n_head_kv == 0
    # one step of the expert's hidden size is the resolution
    step = 3 * shape.n_embd * 18 * n_layer * n_expert
    assert abs(shape.all_expert_bytes - size) <= step / 2 + n_layer * n_expert


def test_trace_geometry_of_the_real_model() -> None:
    shape = scale_model(synthesise_trace(n_decode=1), 4 * GIB)
    assert (shape.n_layer, shape.n_expert, shape.k) == (48, 128, 6)
    assert shape.all_expert_bytes == pytest.approx(4 * GIB, rel=0.04)
    # all that is not experts fits into the slack beside the budget
    assert shape.dense_bytes < 200 * MIB


def top_k(logits: np.ndarray, k: int) -> list[list[int]]:
    return np.argsort(-logits, axis=0, kind="stable")[:k].T.tolist()


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_router_logits_choose_the_traced_experts_in_order(seed: int) -> None:
    trace = synthesise_trace(n_layer=2, n_expert=16, k=4, n_prompt=3, n_decode=20, seed=seed)
    for layer in range(2):
        logits = router_logits(trace, layer)
        assert top_k(logits, 4) == trace.experts[:, layer].tolist()
        ranked = np.sort(logits, axis=0)[::-1]
        assert (ranked[:4] - ranked[1:5]).min() >= build.SMALLEST_GAP - 1e-5
    assert router_matrix(trace, 0, 512).shape == (16, 512)


def test_unrouted_steps_get_the_next_routed_ones_experts(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.csv", GEOMETRY + HEADER + ROWS))
    assert top_k(router_logits(trace, 1), 2) == [[7, 0], [7, 0], [0, 6]]
    with pytest.raises(MobileError, match="routes nothing in layer 0"):
        router_logits(Trace("t", np.full((2, 1, 2), -1, np.int32), trace.weights[:2, :1], 8, 1, "t"), 0)


def test_random_blocks_are_noise_of_small_scale() -> None:
    blocks = random_blocks(np.random.default_rng(0), 32 * 4096)
    scales = blocks[:, :2].copy().view(np.float16).astype(float)
    assert 2**-10 <= scales.min() < scales.max() < 2**-9
    assert len(zlib.compress(blocks.tobytes())) > 0.95 * blocks.nbytes


def test_model_file_has_the_declared_shape(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    seen: list[tuple[int, int]] = []
    path = ensure_model(TINY_TRACE, TINY, tmp_path, lambda done, total: seen.append((done, total)))
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert sum(tensor.n_bytes for tensor in reader.tensors) == TINY.file_bytes
    assert seen[-1] == (TINY.file_bytes, TINY.file_bytes)
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [32, 512, 8]
    experts = sum(tensor.n_bytes for name, tensor in tensors.items() if "_exps." in name)
    assert experts == TINY.all_expert_bytes
    assert reader.get_field("qwen3moe.expert_used_count").contents() == 2
    before = path.stat().st_mtime_ns
    assert ensure_model(TINY_TRACE, TINY, tmp_path) == path
    assert path.stat().st_mtime_ns == before


def test_model_routes_as_traced_through_attention_and_experts(tmp_path: Path) -> None:
    """The forward pass in numpy, each token by itself: what is added to the state never moves a rank."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(ensure_model(TINY_TRACE, TINY, tmp_path))
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}

    def normalised(state: np.ndarray) -> np.ndarray:
        return state / np.sqrt((state**2).mean() + 1e-6)

    added = 0.0
    for step in range(TINY_TRACE.n_steps):
        state = weights["token_embd.weight"][step].astype(np.float64)
        for layer in range(2):
            block = {
                name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"blk.{layer}.")
            }
            # alone in its context, a token attends to its own value
            value = (block["attn_v.weight"] @ normalised(state)).reshape(TINY.n_head_kv, HEAD_SIZE)
            heads = np.repeat(value, TINY.n_head // TINY.n_head_kv, axis=0).ravel()
            state = state + block["attn_output.weight"] @ heads
            x = normalised(state)
            ranked = np.argsort(-(block["ffn_gate_inp.weight"] @ x))[:2].tolist()
            assert ranked == TINY_TRACE.experts[step, layer].tolist()
            for expert in ranked:
                gate, up = (block[f"ffn_{name}_exps.weight"][expert] @ x for name in ("gate", "up"))
                state = state + 0.5 * block["ffn_down_exps.weight"][expert] @ (
                    gate / (1 + np.exp(-gate)) * up
                )
        added = max(added, float(np.abs(np.delete(state, step)).max()))
    assert added > 0, "experts and attention compute nothing"


def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")

    def stop(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(MobileError, match="No space left on device"):
        ensure_model(TINY_TRACE, TINY, tmp_path, stop)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _path: _Usage())
    with pytest.raises(MobileError, match=r"which has 1\.0 MiB free: make room, set XDG_CACHE_HOME"):
        ensure_model(TINY_TRACE, TINY, tmp_path)


class _Usage:
    free = MIB


def test_models_of_different_traces_and_shapes_have_different_names(tmp_path: Path) -> None:
    other = synthesise_trace(n_layer=2, n_expert=8, k=2, n_prompt=5, n_decode=9, seed=2)
    bigger = replace(TINY, n_ff=64)
    paths = {model_path(trace, shape, tmp_path) for trace in (TINY_TRACE, other) for shape in (TINY, bigger)}
    assert len(paths) == 4


def recorded(trace: Trace) -> list[tuple[int, list[list[int]]]]:
    """What an engine would report: the prompt in one pass, its last layer for the last token only."""
    prompt = [(0, trace.experts[: trace.n_prompt, 0].tolist())]
    prompt.append((1, trace.experts[trace.n_prompt - 1 : trace.n_prompt, 1].tolist()))
    return prompt + [(layer, [trace.experts[trace.n_prompt, layer].tolist()]) for layer in range(2)]


def test_recorded_routing_is_compared() -> None:
    passes = [TINY_TRACE.n_prompt, 1]
    assert compare_routing(TINY_TRACE, recorded(TINY_TRACE), passes) == 5 + 1 + 2
    wrong = recorded(TINY_TRACE)
    wrong[3][1][0].reverse()
    with pytest.raises(EngineError, match="step 5, layer 1 routed"):
        compare_routing(TINY_TRACE, wrong, passes)
    with pytest.raises(EngineError, match="routed 3 times, expected 2 passes x 2 layers"):
        compare_routing(TINY_TRACE, wrong[:3], passes)


def test_real_library_follows_the_trace(tmp_path: Path) -> None:
    """Whatever llama.cpp is installed: all ids of the prompt and of every decoded token."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    model = ensure_model(TINY_TRACE, TINY, tmp_path)
    named = os.environ.get("MOBILE_GGUF_STOCK_LIB")
    runner = Runner(model, text_of(TINY_TRACE), {"stock": Path(named) if named else None}, little_k=1)
    ids = runner.routed_ids(Arm("stock", "exact", "100%", 0, GIB), TINY_TRACE.n_decode)
    passes = [TINY_TRACE.n_prompt] + [1] * TINY_TRACE.n_decode
    assert compare_routing(TINY_TRACE, ids, passes) == 5 + 1 + 2 * TINY_TRACE.n_decode
    little = runner.routed_ids(Arm("stock", "little", "100%", 0, GIB), 1)
    assert [len(rows[0]) for _, rows in little] == [1] * 4


def test_a_larger_vocabulary_follows_what_the_smaller_one_does() -> None:
    from mobile_gguf.bench import constraints
    from mobile_gguf.generate.constraint.tokens import TokenTable

    own = TokenTable([b"</s>", *(bytes([i]) for i in range(32, 127))], frozenset({0}), frozenset({0}))
    larger = constraints.enlarged(own, 600)
    assert len(larger.pieces) == len(set(larger.pieces)) == 600
    assert larger.pieces[: len(own.pieces)] == own.pieces
    for arm in ("JSON schema", "GBNF"):
        few, many = (constraints.mask_costs(table, arm) for table in (larger, own))
        # the same text, of longer tokens
        assert 0 < few["tokens"] < many["tokens"] == len(constraints.TEXT)


def test_the_page_of_constraints_has_every_arm() -> None:
    from mobile_gguf.bench import constraints

    mask = {"making_ms": 1.0, "tokens": 3, "mask_us": 10.0, "mask_worst_us": 20.0, "step_us": 2.0}
    result = {
        **{"command": "python", "hardware": "h", "model": "demo", "tokens": 8, "rounds": 2},
        "cpu_ms_per_token": {"none": [1.0, 3.0], "JSON schema": [2.5, 2.5], "GBNF": [1.0, 2.0]},
        "masks": {"600": {"JSON schema": mask, "GBNF": mask}},
    }
    text = constraints.page(result)
    assert "| JSON schema | 2.500 ms (2.500-2.500) | +0.500 ms |" in text
    assert "| GBNF | 1.500 ms (1.000-2.000) | -0.500 ms |" in text
    assert "| 600 | GBNF | 1.0 ms | 10 us, 20 us | 2 us |" in text
