"""Fewer experts per token: against Transformers with its own setting halved, and against itself.

Float32 models and float32 KV. Both sides renormalise as their model does, so a wrong rule shows here. Every
test of fewer experts has a baseline with all experts, so that a failure can be attributed.
"""

from __future__ import annotations

from typing import Any

import engine_libs
import numpy as np
import pytest
import tiny_models

FAMILIES = tiny_models.REFERENCE_MODELS
MIXED = ["mixtral", "qwen2moe", "deepseek3", "gpt-oss", "llama4", "qwen3moe-scales", "nemotron-h"]


def run(name: str, model: str, ops: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    settings = {"mobile": {"budget": "min"}, "f32_kv": True, **more}
    return {"name": name, "model": str(tiny_models.path(model)), "ops": ops, **settings}


def decoded(outcome: engine_libs.Outcome) -> engine_libs.Outcome:
    for name, result in outcome.runs.items():
        assert result["loaded"], f"{name} did not load: {result['load_error']} {result['log'][-500:]}"
        for op in result["ops"]:
            assert op.get("rc", 0) == 0, f"{name}: {op}"
            assert op.get("status", 0) >= 0, f"{name}: {op}"
    return outcome


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, label: str) -> None:
    worst = np.abs(actual - expected).max(axis=-1)
    assert worst.max() <= tolerance, f"{label}: logits off by {worst.max():.3g} at token {worst.argmax()}"


def with_k(k: int, ops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"op": "set_k", "k": k}, {"op": "clear"}, *ops]


@pytest.mark.parametrize("model", FAMILIES)
def test_stock_equals_transformers(model: str) -> None:
    """The baseline: without it, a difference below could be the converter's or llama.cpp's."""
    spec, reference = tiny_models.MODELS[model], tiny_models.reference(model)
    ops = [{"op": "decode", "tokens": reference["tokens"].tolist(), "save": "l"}]
    stock = decoded(engine_libs.run_job(engine_libs.stock_lib(), [run("r", model, ops, mobile=None)]))
    assert_close(stock.arrays["r/l"], reference[f"k{spec.top_k}"], spec.tolerance, "all experts")


@pytest.mark.parametrize("model", FAMILIES)
def test_little_equals_transformers(model: str) -> None:
    engine = engine_libs.engine_lib()
    spec, reference = tiny_models.MODELS[model], tiny_models.reference(model)
    tokens = reference["tokens"].tolist()

    def prompt(name: str) -> dict[str, Any]:
        return {"op": "decode", "tokens": tokens, "save": name}

    def steps(name: str) -> dict[str, Any]:
        return {"op": "steps", "tokens": tokens, "pos": 0, "save": name}

    outcome = decoded(engine_libs.run_job(engine, [run("r", model, [
        {"op": "decode", "tokens": tokens, "save": "big"},
        *with_k(spec.little_k, [prompt("little")]),
        *with_k(spec.little_k, [steps("little-steps")]),
        {"op": "clear"}, {"op": "decode", "tokens": tokens, "k": [spec.little_k] * len(tokens), "save": "batch-k"},
        *with_k(0, [prompt("big-again")]),
        *with_k(spec.top_k + 3, [prompt("more-than-all")]),
        {"op": "counters"},
    ])]))  # fmt: skip
    arrays = outcome.arrays
    big, little = reference[f"k{spec.top_k}"], reference[f"k{spec.little_k}"]
    assert np.abs(big - little).max() > 20 * spec.tolerance, "the reference does not tell big from little"
    assert_close(arrays["r/big"], big, spec.tolerance, "all experts")
    assert_close(arrays["r/little"], little, spec.tolerance, "half the experts, one batch")
    assert_close(arrays["r/little-steps"], little, spec.tolerance, "half the experts, token by token")
    engine_libs.assert_same_bits(arrays["r/batch-k"], arrays["r/little"], "per-token mask of one value")
    engine_libs.assert_same_bits(arrays["r/big-again"], arrays["r/big"], "all experts after little")
    engine_libs.assert_same_bits(arrays["r/more-than-all"], arrays["r/big"], "k above top-k")
    counters = outcome.ops("r", "counters")[0]
    assert counters["n_tokens"] == 6 * len(tokens)
    assert counters["n_tokens_little"] == 3 * len(tokens)


@pytest.mark.parametrize("model", MIXED)
def test_mixed_batch_equals_separate_runs(model: str) -> None:
    """Big and little tokens in one batch; each sequence is all big or all little, so that runs are separable."""
    engine = engine_libs.engine_lib()
    spec = tiny_models.MODELS[model]
    n = 20
    tokens = engine_libs.tokens(2 * n, 3, tiny_models.VOCAB)
    batch = {
        "op": "decode", "tokens": tokens, "seqs": [i % 2 for i in range(2 * n)],
        "pos": [i // 2 for i in range(2 * n)],
    }  # fmt: skip
    mask = [spec.little_k if i % 2 else 0 for i in range(2 * n)]
    outcome = decoded(engine_libs.run_job(engine, [run("r", model, [
        {**batch, "save": "big"},
        *with_k(spec.little_k, [{**batch, "save": "little"}]),
        *with_k(0, [{**batch, "k": mask, "save": "mixed"}]),
        {"op": "clear"}, {**batch, "save": "big-after"},
    ], n_seq_max=2, n_ctx=512)]))  # fmt: skip
    big, little, mixed = (outcome.arrays[f"r/{name}"] for name in ("big", "little", "mixed"))
    assert np.abs(big - little).max() > 20 * spec.tolerance
    assert_close(mixed[0::2], big[0::2], spec.tolerance, "big tokens of the mixed batch")
    assert_close(mixed[1::2], little[1::2], spec.tolerance, "little tokens of the mixed batch")
    engine_libs.assert_same_bits(outcome.arrays["r/big-after"], big, "the mask lasts for one decode")


@pytest.mark.parametrize("kv_unified", [False, True])
def test_mask_follows_tokens_through_ubatches(kv_unified: bool) -> None:
    """llama.cpp cuts a batch into ubatches in an order of its own; the mask is in batch order."""
    engine = engine_libs.engine_lib()
    model = "qwen3moe"
    spec = tiny_models.MODELS[model]
    lengths = (30, 5, 18)
    order = [(seq, i) for i in range(max(lengths)) for seq, n in enumerate(lengths) if i < n]
    tokens = engine_libs.tokens(len(order), 9, tiny_models.VOCAB)
    mask = np.random.default_rng(2).integers(1, spec.top_k + 1, len(order)).tolist()
    apart: list[dict[str, Any]] = []
    for seq in range(len(lengths)):
        mine = [i for i, (s, _) in enumerate(order) if s == seq]
        apart.append({"op": "clear"})
        # one token at a time: nothing left to reorder
        for position, i in enumerate(mine):
            apart += [
                {"op": "set_k", "k": mask[i]},
                {"op": "steps", "tokens": [tokens[i]], "pos": position, "save": f"{i}"},
            ]
    batch = {
        "op": "decode", "tokens": tokens, "seqs": [s for s, _ in order], "pos": [p for _, p in order], "k": mask,
        "save": "batch",
    }  # fmt: skip
    outcome = decoded(engine_libs.run_job(engine, [
        run("apart", model, apart),
        run("batch", model, [batch], n_seq_max=3, n_ctx=3 * 256, n_ubatch=16, kv_unified=kv_unified),
    ]))  # fmt: skip
    expected = np.concatenate([outcome.arrays[f"apart/{i}"] for i in range(len(order))])
    assert_close(outcome.arrays["batch/batch"], expected, spec.tolerance, "masked batch")


def test_mask_with_few_outputs() -> None:
    """The last layer computes only tokens with an output; their mask is still their own."""
    engine = engine_libs.engine_lib()
    model = "olmoe"
    spec = tiny_models.MODELS[model]
    n = 40
    tokens = engine_libs.tokens(n, 4, tiny_models.VOCAB)
    mask = [spec.little_k if i % 3 else 0 for i in range(n)]
    outputs = [2, 3, 17, 18, 39]
    batch = {"op": "decode", "tokens": tokens, "k": mask}
    outcome = decoded(engine_libs.run_job(engine, [run("r", model, [
        {**batch, "save": "all"},
        {"op": "clear"}, {**batch, "outputs": outputs, "save": "few"},
        {"op": "clear"}, {**batch, "outputs": []},
        {"op": "steps", "tokens": tokens[:4], "pos": n, "save": "after-none"},
        {"op": "clear"}, {**batch, "outputs": [n - 1]},
        {"op": "steps", "tokens": tokens[:4], "pos": n, "save": "after-last"},
    ], n_ubatch=16)]))  # fmt: skip
    arrays = outcome.arrays
    assert_close(arrays["r/few"], arrays["r/all"][outputs], spec.tolerance, "tokens with an output")
    engine_libs.assert_same_bits(
        arrays["r/after-none"], arrays["r/after-last"], "after a batch without outputs"
    )


@pytest.mark.parametrize("n", [3, 6, 9])
def test_mask_lasts_for_one_decode(n: int) -> None:
    """Whatever its length: a mask longer than its batch does not reach the next one."""
    engine = engine_libs.engine_lib()
    tokens = engine_libs.tokens(12, 8, tiny_models.VOCAB)
    outcome = engine_libs.run_job(engine, [run("r", "mixtral", [
        {"op": "decode", "tokens": tokens[:6]}, {"op": "decode", "tokens": tokens[6:], "pos": 6, "save": "big"},
        {"op": "remove", "pos": 6}, {"op": "set_batch_k", "k": [1] * n},
        {"op": "decode", "tokens": tokens[6:], "pos": 6, "save": "masked"},
        {"op": "remove", "pos": 6}, {"op": "decode", "tokens": tokens[6:], "pos": 6, "save": "next"},
    ])])  # fmt: skip
    masked, after = outcome.ops("r", "decode")[2:]
    assert after["rc"] == 0
    engine_libs.assert_same_bits(
        outcome.arrays["r/next"], outcome.arrays["r/big"], "the decode after the mask"
    )
    if n == 6:
        assert masked["rc"] == 0
        assert np.abs(outcome.arrays["r/masked"] - outcome.arrays["r/big"]).max() > 0.01


def test_prefetch_of_masked_experts_changes_no_logits() -> None:
    """The big-little sequence: little pass, hints, the same position again with all experts."""
    engine = engine_libs.engine_lib()
    model, spec = "qwen2moe", tiny_models.MODELS["qwen2moe"]
    prompt = engine_libs.tokens(8, 1, tiny_models.VOCAB)
    following = engine_libs.tokens(16, 2, tiny_models.VOCAB)
    start: list[dict[str, Any]] = [{"op": "clear"}, {"op": "decode", "tokens": prompt}]
    big_little: list[dict[str, Any]] = []
    for i, token in enumerate(following):
        position = len(prompt) + i
        big_little += [
            {"op": "set_k", "k": spec.little_k},
            {"op": "steps", "tokens": [token], "pos": position},
            {"op": "prefetch"},
            {"op": "remove", "pos": position},
            {"op": "set_k", "k": 0},
            {"op": "steps", "tokens": [token], "pos": position, "save": f"again-{i}"},
        ]
    outcome = decoded(engine_libs.run_job(engine, [
        run("r", model, [
            *start, {"op": "steps", "tokens": following, "pos": len(prompt), "save": "big"},
            *start, *big_little, {"op": "counters"},
        ], mobile={"budget": "40%"}),
    ]))  # fmt: skip
    again = np.concatenate([outcome.arrays[f"r/again-{i}"] for i in range(len(following))])
    engine_libs.assert_same_bits(again, outcome.arrays["r/big"], "positions run again with all experts")
    queued = sum(op["status"] for op in outcome.ops("r", "prefetch"))
    counters = outcome.ops("r", "counters")[0]
    assert queued > 0
    assert counters["n_prefetched"] > 0
    assert counters["n_prefetch_hits"] > 0


@pytest.mark.parametrize("k", [-1, -5])
def test_negative_k_is_refused(k: int) -> None:
    """And nothing is changed by it."""
    engine = engine_libs.engine_lib()
    tokens = engine_libs.tokens(6, 1, tiny_models.VOCAB)
    outcome = engine_libs.run_job(engine, [run("r", "mixtral", [
        {"op": "decode", "tokens": tokens, "save": "before"},
        {"op": "set_k", "k": k}, {"op": "set_batch_k", "k": [k] * 6},
        {"op": "clear"}, {"op": "decode", "tokens": tokens, "save": "after"},
    ])])  # fmt: skip
    assert outcome.ops("r", "set_k")[0]["status"] == -1
    assert outcome.ops("r", "set_batch_k")[0]["status"] == -1
    engine_libs.assert_same_bits(outcome.arrays["r/after"], outcome.arrays["r/before"], "after refused calls")
