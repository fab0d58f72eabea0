"""With every policy off, the patched build computes what the stock build computes, bit for bit.

The oracle is the unpatched library of the same pin; weight repacking is off in both (`use_extra_bufts`).
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

# prompt length (513 does not fit one ubatch of 512) -> single-token decodes after it
GENERATIONS = {1: 64, 7: 16, 64: 16, 513: 64}
TWO_THREADS = ["mixtral", "deepseek3", "qwen2moe-q8_0", "gpt-oss-mxfp4"]
BUDGETS: dict[str, int | str] = {"all": 0, "40%": "40%", "min": "min"}


def generate(lengths: dict[int, int], vocab: int) -> list[dict[str, Any]]:
    """Ops: for each length a fresh prefill and so many single-token decodes, all logits kept."""
    ops: list[dict[str, Any]] = []
    for n, n_steps in lengths.items():
        prompt = engine_libs.tokens(n, 100 + n, vocab)
        following = engine_libs.tokens(n_steps, 200 + n, vocab)
        ops += [
            {"op": "clear"},
            {"op": "decode", "tokens": prompt, "save": f"prefill-{n}"},
            {"op": "steps", "tokens": following, "pos": n, "save": f"steps-{n}"},
        ]
    return ops


def without_prefill_logits(ops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same ops with logits of a prefill's last token only: a real vocabulary makes them large."""
    return [{**op, "outputs": [len(op["tokens"]) - 1]} if op["op"] == "decode" else op for op in ops]


def tiny_run(name: str, model: str, threads: int = 1, **more: Any) -> dict[str, Any]:
    ops = generate(GENERATIONS if threads == 1 else {513: 16}, tiny_models.VOCAB)
    if "mobile" in more:
        ops.append({"op": "counters"})
    return {"name": name, "model": str(tiny_models.path(model)), "threads": threads, "ops": ops, **more}


def assert_decoded(outcome: engine_libs.Outcome) -> None:
    for name, run in outcome.runs.items():
        assert run["loaded"], f"{name} did not load: {run['load_error']} {run['log'][-500:]}"
        for op in run["ops"]:
            assert op.get("rc", 0) == 0, f"{name}: {op}"
            assert op.get("status", 0) == 0, f"{name}: {op}"


def assert_run_equals(
    patched: engine_libs.Outcome, run: str, stock: dict[str, np.ndarray], reference: str
) -> None:
    """Every array of `reference` in `stock` has its equal in `run` of `patched`."""
    names = [name.split("/", 1)[1] for name in stock if name.startswith(f"{reference}/")]
    assert names
    for name in names:
        engine_libs.assert_same_bits(
            patched.arrays[f"{run}/{name}"], stock[f"{reference}/{name}"], f"{run}, {name} tokens"
        )


@cache
def stock_logits(model: str) -> dict[str, np.ndarray]:
    """The stock build's logits of `tiny_run`, with one thread ("t1/...") and maybe with two ("t2/...")."""
    runs = [tiny_run("t1", model)]
    if model in TWO_THREADS:
        runs.append(tiny_run("t2", model, threads=2))
    outcome = engine_libs.run_job(engine_libs.stock_lib(), runs)
    assert_decoded(outcome)
    return outcome.arrays


@pytest.mark.parametrize(
    "model", [m.name for m in tiny_models.MODELS.values() if m.n_layer_moe and not m.on_demand]
)
def test_logits_equal_stock(model: str) -> None:
    engine = engine_libs.engine_lib()
    stock = stock_logits(model)
    spec = tiny_models.MODELS[model]
    runs = [tiny_run(name, model, mobile={"budget": budget}) for name, budget in BUDGETS.items()]
    runs.append(tiny_run("plain", model))
    if model in TWO_THREADS:
        runs.append(tiny_run("min, 2 threads", model, threads=2, mobile={"budget": "min"}))
    patched = engine_libs.run_job(engine, runs)
    assert_decoded(patched)
    for run in runs:
        assert_run_equals(patched, run["name"], stock, f"t{run['threads']}")
    assert patched.runs["plain"]["info"] is None, "a model loaded without load parameters has no store"
    for name in BUDGETS:
        info, counters = patched.runs[name]["info"], patched.ops(name, "counters")[0]
        assert info["n_layer_moe"] == spec.n_layer_moe
        assert counters["resident_bytes_peak"] <= info["budget_bytes"]
    # the budgets were different ones, and the smaller ones made the store work
    budgets = [patched.runs[name]["info"]["budget_bytes"] for name in BUDGETS]
    assert budgets == sorted(set(budgets), reverse=True)
    assert patched.ops("all", "counters")[0]["n_misses"] == 0
    assert patched.ops("40%", "counters")[0]["n_evictions"] > 0
    assert patched.ops("min", "counters")[0]["n_evictions"] > 0


def test_demo_logits_equal_stock(demo_gguf: Path) -> None:
    """A real model with real routing, computed with two threads."""
    engine = engine_libs.engine_lib()
    ops = without_prefill_logits(generate({1: 8, 7: 8, 64: 64, 513: 8}, 49152))
    run = {"model": str(demo_gguf), "threads": 2, "ops": ops}
    stock = engine_libs.run_job(engine_libs.stock_lib(), [{**run, "name": "t2"}])
    runs = [{**run, "name": name, "mobile": {"budget": budget}} for name, budget in BUDGETS.items()]
    patched = engine_libs.run_job(engine, runs)
    assert_decoded(stock)
    assert_decoded(patched)
    for name in BUDGETS:
        assert_run_equals(patched, name, stock.arrays, "t2")
    budgets = [patched.runs[name]["info"]["budget_bytes"] for name in BUDGETS]
    assert budgets == sorted(set(budgets), reverse=True)


def test_dense_model_equals_stock() -> None:
    """Load parameters do no harm to a model without experts."""
    engine = engine_libs.engine_lib()
    run = tiny_run("r", "dense")
    stock = engine_libs.run_job(engine_libs.stock_lib(), [run])
    patched = engine_libs.run_job(engine, [{**run, "mobile": {"budget": 0}}])
    assert_decoded(stock)
    assert_decoded(patched)
    assert_run_equals(patched, "r", stock.arrays, "r")
    assert patched.runs["r"]["info"]["n_layer_moe"] == 0


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
    engine = engine_libs.engine_lib()
    stock = stock_logits("qwen3moe-q4_k")
    runs = [
        tiny_run(f"{budget}, {settings}", "qwen3moe-q4_k", mobile={"budget": budget, **settings})
        for budget in ("40%", "min")
    ]
    patched = engine_libs.run_job(engine, runs)
    assert_decoded(patched)
    for run in runs:
        assert_run_equals(patched, run["name"], stock, "t1")
        info = patched.runs[run["name"]]["info"]
        assert info["eviction"] == settings.get("eviction", 0)
        if settings.get("io") == 2:
            assert info["direct_io"] == 0


def test_sequences_in_one_batch_equal_stock() -> None:
    """Several sequences of different lengths, which llama.cpp splits into ubatches in an order of its own."""
    engine = engine_libs.engine_lib()
    lengths = (40, 3, 17)
    tokens = engine_libs.tokens(sum(lengths), 5, tiny_models.VOCAB)
    order = [(seq, i) for i in range(max(lengths)) for seq, n in enumerate(lengths) if i < n]
    batch = {"op": "decode", "tokens": tokens, "seqs": [s for s, _ in order], "pos": [i for _, i in order]}
    run = {
        "name": "r", "model": str(tiny_models.path("mixtral")), "n_seq_max": 3, "n_ctx": 3 * 256, "n_ubatch": 16,
        "ops": [{**batch, "save": "l"}],
    }  # fmt: skip
    stock = engine_libs.run_job(engine_libs.stock_lib(), [run])
    patched = engine_libs.run_job(engine, [{**run, "mobile": {"budget": "min"}}])
    assert_decoded(stock)
    assert_decoded(patched)
    assert_run_equals(patched, "r", stock.arrays, "r")


def test_several_models_in_one_process() -> None:
    """Stores do not share state: a second model between two runs of the first changes nothing."""
    engine = engine_libs.engine_lib()
    models = ["mixtral", "gpt-oss-mxfp4", "mixtral"]
    runs = [tiny_run(f"{i} {m}", m, mobile={"budget": "min"}) for i, m in enumerate(models)]
    patched = engine_libs.run_job(engine, runs)
    assert_decoded(patched)
    for run, model in zip(runs, models, strict=True):
        assert_run_equals(patched, run["name"], stock_logits(model), "t1")


def change_one_weight(source: Path, target: Path) -> None:
    """Copies a GGUF with one float of one routed expert changed."""
    target.write_bytes(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name.endswith("ffn_down_exps.weight"))
    with target.open("r+b") as f:
        f.seek(int(tensor.data_offset))
        f.write(np.float32(3.0).tobytes())


def test_one_changed_weight_is_noticed(tmp_path: Path) -> None:
    """The comparison itself can fail: the stock build against itself, with one expert weight changed."""
    changed = tmp_path / "changed.gguf"
    change_one_weight(tiny_models.path("mixtral"), changed)
    run = tiny_run("t1", "mixtral")
    outcome = engine_libs.run_job(engine_libs.stock_lib(), [{**run, "model": str(changed)}])
    assert_decoded(outcome)
    with pytest.raises(pytest.fail.Exception, match="logits differ"):
        assert_run_equals(outcome, "t1", stock_logits("mixtral"), "t1")


def test_one_changed_weight_reaches_the_store(tmp_path: Path) -> None:
    """The store serves the file's bytes: with the weight changed, it agrees with stock on the changed file."""
    engine = engine_libs.engine_lib()
    changed = tmp_path / "changed.gguf"
    change_one_weight(tiny_models.path("mixtral"), changed)
    stock = engine_libs.run_job(
        engine_libs.stock_lib(), [{**tiny_run("t1", "mixtral"), "model": str(changed)}]
    )
    patched = engine_libs.run_job(
        engine, [{**tiny_run("min", "mixtral", mobile={"budget": "min"}), "model": str(changed)}]
    )
    assert_decoded(patched)
    assert_run_equals(patched, "min", stock.arrays, "t1")
