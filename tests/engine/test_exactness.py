"""With every policy off, the patched build computes what the stock build computes, bit for bit.

The oracle is the unpatched library of the same pin; weight repacking is off in both (``use_extra_bufts``).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import gguf
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, on_stock, run, succeeded, tokens

# prompt length (513 does not fit one ubatch of 512) -> single-token decodes after it
GENERATIONS = {1: 64, 7: 16, 64: 16, 513: 64}
BUDGETS: dict[str, int | str] = {"all": 0, "40%": "40%", "min": "min"}
MOE_MODELS = [m.name for m in tiny_models.MODELS.values() if m.n_layer_moe and not m.on_demand]
# two threads that wait for each other cost too much on a busy machine to do it for every model
TWO_THREADS = ["mixtral", "deepseek3", "qwen2moe-q8_0", "gpt-oss-mxfp4"]


def generate(lengths: dict[int, int], vocab: int = tiny_models.VOCAB) -> list[dict[str, Any]]:
    """Ops: for each length a fresh prefill and so many single-token decodes, all logits kept."""
    ops: list[dict[str, Any]] = []
    for n, n_steps in lengths.items():
        ops += [
            {"op": "clear"},
            {"op": "decode", "tokens": tokens(n, 100 + n, vocab), "save": f"prefill-{n}"},
            {"op": "steps", "tokens": tokens(n_steps, 200 + n, vocab), "pos": n, "save": f"steps-{n}"},
        ]
    return ops


def without_prefill_logits(ops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same ops with logits of a prefill's last token only: a real vocabulary makes them large."""
    return [{**op, "outputs": [len(op["tokens"]) - 1]} if op["op"] == "decode" else op for op in ops]


def generation(
    name: str, model: str | Path, budget: int | str | None, threads: int = 1, **more: Any
) -> dict[str, Any]:
    ops = generate(GENERATIONS if threads == 1 else {513: 16})
    if budget is not None:
        ops.append({"op": "counters"})
    return run(name, model, ops, budget, threads=threads, **more)


def assert_run_equals(
    patched: engine_libs.Outcome, name: str, stock: dict[str, np.ndarray], reference: str
) -> None:
    """Every array that ``reference`` saved in ``stock`` has its equal in the run ``name`` of ``patched``."""
    saved = [array.removeprefix(f"{reference}/") for array in stock if array.startswith(f"{reference}/")]
    assert saved
    for array in saved:
        assert_same_bits(patched.arrays[f"{name}/{array}"], stock[f"{reference}/{array}"], f"{name}, {array}")


@cache
def stock_logits(model: str) -> dict[str, np.ndarray]:
    """The stock build's logits of ``generation``, by one thread ("t1/..."), maybe by two ("t2/...")."""
    runs = [generation("t1", model, None)]
    if model in TWO_THREADS:
        runs.append(generation("t2", model, None, threads=2))
    return succeeded(on_stock(*runs)).arrays


@pytest.mark.parametrize("model", MOE_MODELS)
def test_logits_equal_stock(model: str) -> None:
    runs = [generation(name, model, budget) for name, budget in BUDGETS.items()]
    runs.append(generation("plain", model, None))
    runs.append(generation("40%, prefault", model, "40%", mobile={"prefault": 1}))
    if model in TWO_THREADS:
        runs.append(generation("min, 2 threads", model, "min", threads=2))
    patched = succeeded(on_engine(*runs))
    for each in runs:
        assert_run_equals(patched, each["name"], stock_logits(model), f"t{each['threads']}")
    assert patched.runs["plain"]["info"] is None, "a model loaded without load parameters has no store"
    for name in BUDGETS:
        info, counters = patched.runs[name]["info"], patched.ops(name, "counters")[0]
        assert info["n_layer_moe"] == tiny_models.MODELS[model].n_layer_moe
        assert counters["resident_bytes_peak"] <= info["budget_bytes"]
    ahead, usual = (patched.ops(name, "counters")[0] for name in ("40%, prefault", "40%"))
    assert (ahead["n_misses"], ahead["bytes_read"]) == (usual["n_misses"], usual["bytes_read"])
    # the budgets were different ones, and the smaller ones made the store work
    budgets = [patched.runs[name]["info"]["budget_bytes"] for name in BUDGETS]
    assert budgets == sorted(set(budgets), reverse=True)
    assert patched.ops("all", "counters")[0]["n_misses"] == 0
    assert patched.ops("40%", "counters")[0]["n_evictions"] > 0
    assert patched.ops("min", "counters")[0]["n_evictions"] > 0


def test_demo_logits_equal_stock(demo_gguf: Path) -> None:
    """A real model with real routing."""
    long = without_prefill_logits(generate({1: 8, 7: 8, 64: 64, 513: 8}, vocab=49152))
    short = without_prefill_logits(generate({7: 8}, vocab=49152))
    stock = succeeded(
        on_stock(
            run("t1", demo_gguf, long, None, threads=1),
            run("t2", demo_gguf, short, None, threads=2),
        )
    )
    runs = [run(name, demo_gguf, long, budget, threads=1) for name, budget in BUDGETS.items()]
    runs.append(run("min, 2 threads", demo_gguf, short, "min", threads=2))
    patched = succeeded(on_engine(*runs))
    for each in runs:
        assert_run_equals(patched, each["name"], stock.arrays, f"t{each['threads']}")
    budgets = [patched.runs[name]["info"]["budget_bytes"] for name in BUDGETS]
    assert budgets == sorted(set(budgets), reverse=True)


def test_dense_model_equals_stock() -> None:
    """Load parameters do no harm to a model without experts."""
    ops = generate(GENERATIONS)
    patched = succeeded(on_engine(run("r", "dense", ops, 0)))
    assert_run_equals(patched, "r", succeeded(on_stock(run("r", "dense", ops, None))).arrays, "r")


@pytest.mark.parametrize(
    "settings",
    [
        {"eviction": 1},
        {"eviction": 1, "n_io_threads": 1},
        {"n_io_threads": 8},
        {"io": 2},
        {"io": 2, "n_io_threads": 1, "eviction": 1},
    ],
    ids=str,
)
def test_store_settings_do_not_change_logits(settings: dict[str, int]) -> None:
    model = "qwen3moe-q4_k"
    patched = succeeded(
        on_engine(*(generation(budget, model, budget, mobile=settings) for budget in ("40%", "min")))
    )
    for name in ("40%", "min"):
        assert_run_equals(patched, name, stock_logits(model), "t1")
        info = patched.runs[name]["info"]
        assert info["eviction"] == settings.get("eviction", 2)
        if settings.get("io") == 2:
            assert info["direct_io"] == 0


def test_sequences_in_one_batch_equal_stock() -> None:
    """Several sequences of different lengths, which llama.cpp splits into ubatches in an order of its own."""
    lengths = (40, 3, 17)
    order = [(seq, i) for i in range(max(lengths)) for seq, n in enumerate(lengths) if i < n]
    batch = {
        "op": "decode", "tokens": tokens(len(order), 5), "seqs": [seq for seq, _ in order],
        "pos": [i for _, i in order], "save": "logits",
    }  # fmt: skip
    settings: dict[str, Any] = {"n_seq_max": 3, "n_ctx": 3 * 256, "n_ubatch": 16}
    stock = succeeded(on_stock(run("r", "mixtral", [batch], None, **settings)))
    patched = succeeded(on_engine(run("r", "mixtral", [batch], "min", **settings)))
    assert_run_equals(patched, "r", stock.arrays, "r")


def test_several_models_in_one_process() -> None:
    """Stores do not share state: a second model between two runs of the first changes nothing."""
    models = {"first": "mixtral", "second": "gpt-oss-mxfp4", "first again": "mixtral"}
    patched = succeeded(on_engine(*(generation(name, model, "min") for name, model in models.items())))
    for name, model in models.items():
        assert_run_equals(patched, name, stock_logits(model), "t1")


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the tiny Mixtral with one float of one routed expert changed."""
    source, target = tiny_models.path("mixtral"), tmp_path / "changed.gguf"
    target.write_bytes(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name.endswith("ffn_down_exps.weight"))
    with target.open("r+b") as f:
        f.seek(int(tensor.data_offset))
        f.write(np.float32(3.0).tobytes())
    return target


def test_one_changed_weight_is_noticed(changed: Path) -> None:
    """The comparison itself can fail: the stock build against itself, with one expert weight changed."""
    outcome = succeeded(on_stock(generation("t1", changed, None)))
    with pytest.raises(pytest.fail.Exception, match="logits differ"):
        assert_run_equals(outcome, "t1", stock_logits("mixtral"), "t1")


def test_one_changed_weight_reaches_the_store(changed: Path) -> None:
    """The store serves the file's bytes: it agrees with the stock build on the changed file."""
    stock = succeeded(on_stock(generation("t1", changed, None)))
    patched = succeeded(on_engine(generation("min", changed, "min")))
    assert_run_equals(patched, "min", stock.arrays, "t1")
