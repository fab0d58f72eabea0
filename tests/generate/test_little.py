"""Fewer experts per token: against Transformers with its own setting halved, and against itself.

Float32 models and float32 KV. Both sides renormalise as their model does, so a wrong rule shows here. Every
test of fewer experts has a baseline with all experts, so that a failure can be attributed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, on_stock, run, succeeded, tokens

FAMILIES = tiny_models.REFERENCE_MODELS
MIXED = ["mixtral", "qwen2moe", "deepseek3", "gpt-oss", "llama4", "qwen3moe-scales", "nemotron-h"]
F32: dict[str, Any] = {"f32_kv": True}


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, label: str) -> None:
    assert actual.shape == expected.shape, label
    worst = np.abs(actual - expected).max(axis=-1)
    assert worst.max() <= tolerance, f"{label}: logits off by {worst.max():.3g} at token {worst.argmax()}"


def with_k(k: int, *ops: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"op": "set_k", "k": k}, {"op": "clear"}, *ops]


@pytest.mark.parametrize("model", FAMILIES)
def test_stock_equals_transformers(model: str) -> None:
    """The baseline: without it, a difference below could be the converter's or llama.cpp's."""
    spec, reference = tiny_models.MODELS[model], tiny_models.reference(model)
    ops = [{"op": "decode", "tokens": reference["tokens"].tolist(), "save": "logits"}]
    stock = succeeded(on_stock(run("r", model, ops, None, **F32)))
    assert_close(stock.arrays["r/logits"], reference[f"k{spec.top_k}"], spec.tolerance, "all experts")


@pytest.mark.parametrize("model", FAMILIES)
def test_little_equals_transformers(model: str) -> None:
    spec, reference = tiny_models.MODELS[model], tiny_models.reference(model)
    text = reference["tokens"].tolist()
    prompt = {"op": "decode", "tokens": text}
    outcome = succeeded(on_engine(run("r", model, [
        {**prompt, "save": "big"},
        *with_k(spec.little_k, {**prompt, "save": "little"}),
        *with_k(spec.little_k, {"op": "steps", "tokens": text, "pos": 0, "save": "little-steps"}),
        *with_k(0, {**prompt, "k": [spec.little_k] * len(text), "save": "batch-k"}),
        *with_k(0, {**prompt, "save": "big-again"}),
        *with_k(spec.top_k + 3, {**prompt, "save": "more-than-all"}),
        {"op": "counters"},
    ], **F32)))  # fmt: skip
    arrays = outcome.arrays
    big, little = reference[f"k{spec.top_k}"], reference[f"k{spec.little_k}"]
    assert np.abs(big - little).max() > 20 * spec.tolerance, "the reference does not tell big from little"
    assert_close(arrays["r/big"], big, spec.tolerance, "all experts")
    assert_close(arrays["r/little"], little, spec.tolerance, "half the experts, one batch")
    assert_close(arrays["r/little-steps"], little, spec.tolerance, "half the experts, token by token")
    assert_same_bits(arrays["r/batch-k"], arrays["r/little"], "per-token mask of one value")
    assert_same_bits(arrays["r/big-again"], arrays["r/big"], "all experts after little")
    assert_same_bits(arrays["r/more-than-all"], arrays["r/big"], "k above top-k")
    counters = outcome.ops("r", "counters")[0]
    assert counters["n_tokens"] == 6 * len(text)
    assert counters["n_tokens_little"] == 3 * len(text)


@pytest.mark.parametrize("model", MIXED)
def test_mixed_batch_equals_separate_runs(model: str) -> None:
    """Big and little tokens in one batch, a sequence of each, so that they can be told apart."""
    spec = tiny_models.MODELS[model]
    n = 20
    batch = {
        "op": "decode", "tokens": tokens(2 * n, 3), "seqs": [i % 2 for i in range(2 * n)],
        "pos": [i // 2 for i in range(2 * n)],
    }  # fmt: skip
    mask = [spec.little_k if i % 2 else 0 for i in range(2 * n)]
    arrays = succeeded(on_engine(run("r", model, [
        {**batch, "save": "big"},
        *with_k(spec.little_k, {**batch, "save": "little"}),
        *with_k(0, {**batch, "k": mask, "save": "mixed"}),
        *with_k(0, {**batch, "save": "big-after"}),
    ], n_seq_max=2, n_ctx=512, **F32))).arrays  # fmt: skip
    big, little, mixed = arrays["r/big"], arrays["r/little"], arrays["r/mixed"]
    assert np.abs(big - little).max() > 20 * spec.tolerance
    assert_close(mixed[0::2], big[0::2], spec.tolerance, "big tokens of the mixed batch")
    assert_close(mixed[1::2], little[1::2], spec.tolerance, "little tokens of the mixed batch")
    assert_same_bits(arrays["r/big-after"], big, "after the mixed batch")


@pytest.mark.parametrize("kv_unified", [False, True])
def test_mask_follows_tokens_through_ubatches(kv_unified: bool) -> None:
    """llama.cpp cuts a batch into ubatches in an order of its own; the mask is in batch order."""
    model, spec = "qwen3moe", tiny_models.MODELS["qwen3moe"]
    lengths = (30, 5, 18)
    order = [(seq, i) for i in range(max(lengths)) for seq, n in enumerate(lengths) if i < n]
    text = tokens(len(order), 9)
    mask = np.random.default_rng(2).integers(1, spec.top_k + 1, len(order)).tolist()
    apart: list[dict[str, Any]] = []
    for seq in range(len(lengths)):
        apart.append({"op": "clear"})
        # one token at a time: nothing left to reorder
        for i in [i for i, (owner, _) in enumerate(order) if owner == seq]:
            apart += [
                {"op": "set_k", "k": mask[i]},
                {"op": "steps", "tokens": [text[i]], "pos": order[i][1], "save": f"{i}"},
            ]
    batch = {
        "op": "decode", "tokens": text, "k": mask, "save": "all",
        "seqs": [seq for seq, _ in order], "pos": [i for _, i in order],
    }  # fmt: skip
    arrays = succeeded(on_engine(
        run("apart", model, apart, **F32),
        run("batch", model, [batch], n_seq_max=3, n_ctx=3 * 256, n_ubatch=16, kv_unified=kv_unified, **F32),
    )).arrays  # fmt: skip
    expected = np.concatenate([arrays[f"apart/{i}"] for i in range(len(order))])
    assert_close(arrays["batch/all"], expected, spec.tolerance, "masked batch")


def test_mask_with_few_outputs() -> None:
    """The last layer computes only tokens with an output; their mask is still their own."""
    model, spec = "olmoe", tiny_models.MODELS["olmoe"]
    n = 40
    text = tokens(n, 4)
    outputs = [2, 3, 17, 18, 39]
    batch = {"op": "decode", "tokens": text, "k": [spec.little_k if i % 3 else 0 for i in range(n)]}
    after = {"op": "steps", "tokens": text[:4], "pos": n}
    arrays = succeeded(on_engine(run("r", model, [
        {**batch, "save": "all"},
        {"op": "clear"}, {**batch, "outputs": outputs, "save": "few"},
        {"op": "clear"}, {**batch, "outputs": []}, {**after, "save": "after-none"},
        {"op": "clear"}, {**batch, "outputs": [n - 1]}, {**after, "save": "after-last"},
    ], n_ubatch=16, **F32))).arrays  # fmt: skip
    assert_close(arrays["r/few"], arrays["r/all"][outputs], spec.tolerance, "tokens with an output")
    assert_same_bits(arrays["r/after-none"], arrays["r/after-last"], "after a batch without outputs")


@pytest.mark.parametrize("n", [3, 6, 9])
def test_mask_lasts_for_one_decode(n: int) -> None:
    """Whatever its length: a mask longer than its batch does not reach the next one."""
    text = tokens(12, 8)
    second = {"op": "decode", "tokens": text[6:], "pos": 6}
    outcome = on_engine(run("r", "mixtral", [
        {"op": "decode", "tokens": text[:6]}, {**second, "save": "big"},
        {"op": "remove", "pos": 6}, {"op": "set_batch_k", "k": [1] * n}, {**second, "save": "masked"},
        {"op": "remove", "pos": 6}, {**second, "save": "next"},
    ]))  # fmt: skip
    masked, after = outcome.ops("r", "decode")[2:]
    assert after["rc"] == 0
    assert_same_bits(outcome.arrays["r/next"], outcome.arrays["r/big"], "the decode after the mask")
    if n == 6:
        assert masked["rc"] == 0
        assert np.abs(outcome.arrays["r/masked"] - outcome.arrays["r/big"]).max() > 0.01


def test_prefetch_of_masked_experts_changes_no_logits() -> None:
    """The big-little sequence: little pass, hints, the same position again with all experts."""
    model, spec = "qwen2moe", tiny_models.MODELS["qwen2moe"]
    prompt, following = tokens(8, 1), tokens(16, 2)
    start: list[dict[str, Any]] = [{"op": "clear"}, {"op": "decode", "tokens": prompt}]
    big_little: list[dict[str, Any]] = []
    for i, token in enumerate(following):
        step = {"op": "steps", "tokens": [token], "pos": len(prompt) + i}
        big_little += [
            {"op": "set_k", "k": spec.little_k}, step, {"op": "prefetch"},
            {"op": "remove", "pos": len(prompt) + i},
            {"op": "set_k", "k": 0}, {**step, "save": f"again-{i}"},
        ]  # fmt: skip
    outcome = succeeded(on_engine(run("r", model, [
        *start, {"op": "steps", "tokens": following, "pos": len(prompt), "save": "big"},
        {"op": "set_prefetch", "mode": 1}, *start, *big_little, {"op": "counters"},
    ], "40%")))  # fmt: skip
    again = np.concatenate([outcome.arrays[f"r/again-{i}"] for i in range(len(following))])
    assert_same_bits(again, outcome.arrays["r/big"], "positions run again with all experts")
    counters = outcome.ops("r", "counters")[0]
    assert sum(op["status"] for op in outcome.ops("r", "prefetch")) > 0
    assert 0 < counters["n_prefetch_hits"] <= counters["n_prefetched"]


@pytest.mark.parametrize("k", [-1, -5])
def test_negative_k_is_refused(k: int) -> None:
    """And nothing is changed by it."""
    prompt = {"op": "decode", "tokens": tokens(6, 1)}
    outcome = on_engine(run("r", "mixtral", [
        {**prompt, "save": "before"},
        {"op": "set_k", "k": k}, {"op": "set_batch_k", "k": [k] * 6},
        {"op": "clear"}, {**prompt, "save": "after"},
    ]))  # fmt: skip
    assert outcome.ops("r", "set_k")[0]["status"] == -1
    assert outcome.ops("r", "set_batch_k")[0]["status"] == -1
    assert_same_bits(outcome.arrays["r/after"], outcome.arrays["r/before"], "after refused calls")
