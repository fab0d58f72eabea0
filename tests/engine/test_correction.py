"""Corrections of little tokens in the engine: against Transformers, against itself, and refusals.

The oracle runs the same masked ids and the same maps; it also computes what three faults would give, which
the engine's logits must not be.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import layout_files
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, run, succeeded, tokens
from transformers_jobs import arrays_of

from mobile_gguf.convert.calibrate.collect import collect
from mobile_gguf.engine.binding import find_engine

F32: dict[str, Any] = {"f32_kv": True}
STATE, ARGUMENT = -2, -1  # enum mobile_status
# whether each family's top-k has a fixed sum
FAMILIES = {"qwen3moe": True, "olmoe": False, "qwen2moe": False, "deepseek3": True, "gpt-oss": True}
PLAIN = {"correct": "little", "shifts": True, "turned": 0}
FAULTS = {
    "shift forgotten": {**PLAIN, "shifts": False},
    "applied to big tokens": {**PLAIN, "correct": "all"},
    "wrong layer": {**PLAIN, "turned": 1},
}
RUNS = {"corrected": PLAIN, "off": {**PLAIN, "correct": "none"}, **FAULTS}


def text_of(model: str) -> list[int]:
    return tiny_models.reference(model)["tokens"].tolist()


@cache
def scripted(model: str) -> dict[str, Any]:
    """Maps that change much, and which tokens have how many experts: all, half, one less."""
    spec = tiny_models.MODELS[model]
    half = spec.little_k
    rng = np.random.default_rng(7)
    shape = spec.config["num_hidden_layers"], spec.config["hidden_size"]
    counts = [0, half, half, 0, spec.top_k - 1, half]
    return {
        "k": [counts[i % len(counts)] for i in range(len(text_of(model)))],
        "of": half,
        "scale": rng.normal(1.0, 0.4, shape).astype(np.float32).tolist(),
        "shift": rng.normal(0.0, 0.3, shape).astype(np.float32).tolist(),
        "mass": half + 1,
        "ways": [[half, 0], [half, half + 1]],
    }


@cache
def transformers_arrays() -> dict[str, np.ndarray]:
    """What Transformers computes of every family, "model/run" and "model/big/LAYER"."""
    models = [
        {
            "name": model, "spec": asdict(tiny_models.MODELS[model]), "normalised": normalised, "runs": RUNS,
            **scripted(model),
        }
        for model, normalised in FAMILIES.items()
    ]  # fmt: skip
    return arrays_of("correction_child", models)


def correction(model: str, **changes: Any) -> dict[str, Any]:
    s = scripted(model)
    return {"op": "correction", "k": s["of"], "scale": s["scale"], "shift": s["shift"], **changes}


def batch(model: str, save: str) -> list[dict[str, Any]]:
    """Every token with its own number of experts, all at once."""
    return [
        {"op": "clear"},
        {"op": "decode", "tokens": text_of(model), "k": scripted(model)["k"], "save": save},
    ]


def steps(model: str, save: str) -> list[dict[str, Any]]:
    """The same one after another."""
    ops: list[dict[str, Any]] = [{"op": "clear"}]
    for i, (token, k) in enumerate(zip(text_of(model), scripted(model)["k"], strict=True)):
        ops += [{"op": "set_k", "k": k}, {"op": "steps", "tokens": [token], "pos": i, "save": f"{save}/{i}"}]
    return [*ops, {"op": "set_k", "k": 0}]


def rows_of(outcome: engine_libs.Outcome, name: str, model: str) -> np.ndarray:
    """What ``steps`` saved."""
    return np.concatenate([outcome.arrays[f"{name}/{i}"] for i in range(len(text_of(model)))])


@pytest.mark.parametrize("budget", ["min", 0], ids=["a store", "all in memory"])
@pytest.mark.parametrize("model", FAMILIES)
def test_corrected_tokens_equal_transformers(model: str, budget: str | int) -> None:
    """In a batch of all kinds, and one by one; the faults are further off than any rounding."""
    reference, tolerance = transformers_arrays(), tiny_models.MODELS[model].tolerance
    mass = {"op": "mass", "k": scripted(model)["mass"]}
    outcome = succeeded(on_engine(run("r", model, [
        mass, *batch(model, "off"), correction(model), *batch(model, "corrected"), *steps(model, "steps"),
        {"op": "corrected", "on": False}, *batch(model, "off again"),
    ], budget, **F32)))  # fmt: skip
    for name, rows in {
        "corrected": outcome.arrays["r/corrected"], "off": outcome.arrays["r/off"],
    }.items():  # fmt: skip
        assert np.abs(rows - reference[f"{model}/{name}"]).max() <= tolerance, name
    by_steps = rows_of(outcome, "r/steps", model)
    assert np.abs(by_steps - reference[f"{model}/corrected"]).max() <= tolerance
    assert_same_bits(outcome.arrays["r/off again"], outcome.arrays["r/off"], "off again")
    for name in ("off", *FAULTS):
        far = np.abs(outcome.arrays["r/corrected"] - reference[f"{model}/{name}"]).max()
        assert far > 20 * tolerance, f"{name} would not be seen on {model}"


OTHERS = [*FAMILIES, "mixtral", "granitemoe-swa", "gemma4", "llama4", "nemotron-h", "qwen2moe-q8_0"]


@pytest.mark.parametrize("model", OTHERS)
def test_off_and_big_tokens_have_the_same_bits(model: str) -> None:
    """With maps that would ruin everything: not turned on, for another number of experts, for big tokens."""
    spec = tiny_models.MODELS[model]
    text = tokens(16, 3)
    shape = spec.config["num_hidden_layers"], spec.config["hidden_size"]
    maps = {"scale": np.full(shape, 3.0).tolist(), "shift": np.full(shape, 9.0).tolist()}
    half = max(1, spec.top_k // 2)

    def follow(k: int, save: str) -> list[dict[str, Any]]:
        whole = {"op": "decode", "tokens": text, "save": f"{save} prompt"}
        one = {"op": "steps", "tokens": text, "pos": 0, "save": save}
        return [{"op": "set_k", "k": k}, {"op": "clear"}, whole, {"op": "clear"}, one]

    set_it = {"op": "correction", "k": half, **maps}
    none = {"op": "correction", "k": 0, "scale": None, "shift": None}
    outcome = succeeded(on_engine(run("r", model, [
        *follow(0, "big"), *follow(half, "little"),
        {**set_it, "on": False}, *follow(0, "big off"), *follow(half, "little off"),
        {**set_it, "on": True}, *follow(0, "big on"), *follow(half, "little on"),
        none, *follow(half, "little none"),
    ], "40%")))  # fmt: skip
    for kind in ("", " prompt"):
        for big in ("big off", "big on"):
            assert_same_bits(outcome.arrays[f"r/{big}{kind}"], outcome.arrays[f"r/big{kind}"], big + kind)
        for little in ("little off", "little none"):
            expected = outcome.arrays[f"r/little{kind}"]
            assert_same_bits(outcome.arrays[f"r/{little}{kind}"], expected, little + kind)
        assert np.abs(outcome.arrays[f"r/little on{kind}"] - outcome.arrays[f"r/little{kind}"]).max() > 0.1


def test_another_number_of_experts_is_not_corrected() -> None:
    model, text = "olmoe", tokens(12, 3)
    ops = [{"op": "set_k", "k": 3}, {"op": "steps", "tokens": text, "pos": 0, "save": "before"}]
    ops += [correction(model), {"op": "clear"}, {"op": "steps", "tokens": text, "pos": 0, "save": "after"}]
    outcome = succeeded(on_engine(run("r", model, ops, "40%")))
    assert scripted(model)["of"] != 3
    assert_same_bits(outcome.arrays["r/after"], outcome.arrays["r/before"], "tokens with 3 experts")


def test_threads_and_segments_are_corrected_alike(tmp_path: Path) -> None:
    model = "qwen3moe"
    ops = [correction(model), *batch(model, "rows")]
    outcome = succeeded(on_engine(*(run(f"{n}", model, ops, "min", threads=n, **F32) for n in (1, 2, 3))))
    for n in (2, 3):
        assert_same_bits(outcome.arrays[f"{n}/rows"], outcome.arrays["1/rows"], f"{n} threads")
    cut = layout_files.write_per_expert(tiny_models.path(model), tmp_path / "m.gguf", 4)
    in_segments = succeeded(on_engine(run("r", cut, ops, "min", **F32))).arrays["r/rows"]
    assert np.abs(in_segments - outcome.arrays["1/rows"]).max() <= tiny_models.MODELS[model].tolerance


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model = "qwen3moe"
    s, spec = scripted(model), tiny_models.MODELS[model]
    step = {"op": "steps", "tokens": tokens(6, 1), "pos": 0}
    wrong: dict[str, dict[str, Any]] = {
        "a correction needs": {"scale": s["scale"][:-1], "shift": s["shift"][:-1]},
        "scales and shifts": {"shift": None},
        "1 to 3 experts": {"k": spec.top_k},
        "tokens with 1": {"k": 0},
        "must be finite": {"shift": [[float("nan")] * spec.config["hidden_size"]] * 4},
    }
    ops: list[dict[str, Any]] = [{"op": "set_k", "k": s["of"]}, {**step, "save": "before"}, {"op": "clear"}]
    ops += [correction(model, **changes) for changes in wrong.values()]
    ops += [{**step, "save": "after"}]
    outcome = on_engine(run("r", model, ops, "40%"))
    for text, answer in zip(wrong, outcome.ops("r", "correction"), strict=True):
        assert (answer["status"], text in answer["error"]) == (ARGUMENT, True), answer
    assert_same_bits(outcome.arrays["r/after"], outcome.arrays["r/before"], "after refused calls")
    dense = on_engine(run("r", model, [correction(model)], None)).ops("r", "correction")[0]
    assert (dense["status"], "no expert store" in dense["error"]) == (STATE, True)


@pytest.mark.parametrize("model", FAMILIES)
def test_what_is_observed_is_transformers_sums(model: str) -> None:
    """Of all experts and of fewer, by channel: sums and squares, from one pass with all of them."""
    engine_libs.engine_lib()
    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")
    reference, s = transformers_arrays(), scripted(model)
    ways = [tuple(way) for way in s["ways"]]
    found = collect(tiny_models.path(model), [text_of(model)], threads=1, neurons=False, ways=ways).little
    layers = {int(name.split("/")[2]) for name in reference if name.startswith(f"{model}/big/")}
    assert {(one.layer, one.way) for one in found} == {(layer, i) for layer in layers for i in range(2)}
    for one in found:
        assert one.n_tokens == len(text_of(model))
        big = reference[f"{model}/big/{one.layer}"].astype(np.float64)
        little = reference[f"{model}/little/{one.way}/{one.layer}"].astype(np.float64)
        for got, rows in ((one.big, big), (one.little, little)):
            np.testing.assert_allclose(got, rows.sum(0), atol=5e-3 * np.abs(rows).sum(0).max())
        for got, rows in ((one.big2, big), (one.little2, little)):
            np.testing.assert_allclose(got, (rows**2).sum(0), rtol=2e-2, atol=1e-3 * (rows**2).sum(0).max())
