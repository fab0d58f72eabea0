"""The ladder of lossy rules in the engine: against Transformers, against itself, and refusals.

The resident set is scripted, so that what a rule must do is known; what the store makes of displaced experts
is at the end.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import loss_oracle as oracle
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, run, succeeded, tokens
from loss_jobs import FAMILIES, RULES, in_transformers, set_up, text_of, under

F32: dict[str, Any] = {"f32_kv": True}
STATE, ARGUMENT = -2, -1  # enum mobile_status
# of tokens that are computed together, and of kept weights that do not take over all of the sum
TOGETHER = {"prompt": {"prompt_drop": 0.06}, "prompt, all but the heaviest": {"prompt_drop": 1.0, "keep": 1}}
WITH_MASS = {"half the mass": {"drop": 2.0}, "as the model has them": {"drop": 2.0, "keep": 1}}
MASS = {"half the mass": 3, "as the model has them": 8}
COUNTS = ("n_layers", "n_missing", "n_dropped", "n_left_out", "n_substituted", "n_again", "moved_weight")


@cache
def transformers_logits() -> dict[str, np.ndarray]:
    """Under every rule of this file, one pass of Transformers for all tests."""
    entry = {"rules": {"off": {}, **RULES, **TOGETHER, **WITH_MASS}, "mass": MASS}
    return in_transformers(dict.fromkeys(FAMILIES, entry))


@pytest.mark.parametrize("model", FAMILIES)
def test_rules_equal_transformers(model: str) -> None:
    """Every rule with the same experts and weights, for normalised and for other families."""
    reference, tolerance = transformers_logits(), tiny_models.MODELS[model].tolerance
    ops = set_up(model)
    for rule, rules in {"off": {}, **RULES}.items():
        ops += under(rules, text_of(model), rule)
    outcome = succeeded(on_engine(run("r", model, ops, "min", **F32)))
    counted = outcome.ops("r", "loss_counters")
    exact = reference[f"{model}/off"]
    for i, rule in enumerate(["off", *RULES]):
        want, got = reference[f"{model}/{rule}"], outcome.arrays[f"r/{rule}"]
        assert np.abs(got - want).max() <= tolerance, rule
        for name in COUNTS:
            told = float(reference.get(f"{model}/{rule}/{name}", 0.0))
            assert counted[i][name] == pytest.approx(told if rule != "off" else 0, rel=1e-4), (rule, name)
        if rule != "off":
            assert np.abs(want - exact).max() > 20 * tolerance, f"{rule} does nothing on {model}"
            assert sum(counted[i][name] for name in ("n_dropped", "n_left_out", "n_substituted")) > 0


@pytest.mark.parametrize("model", FAMILIES)
def test_prompts_and_other_masses_equal_transformers(model: str) -> None:
    reference, tolerance = transformers_logits(), tiny_models.MODELS[model].tolerance
    text = text_of(model)
    ops = set_up(model)
    for rule, rules in TOGETHER.items():
        ops += [{"op": "clear"}, {"op": "loss", "rules": rules}, {"op": "reset_counters"}]
        ops += [{"op": "decode", "tokens": text, "save": rule}, {"op": "loss_counters"}]
    for rule, rules in WITH_MASS.items():
        ops += [{"op": "mass", "k": MASS[rule]}, *under(rules, text, rule)]
    # one token at a time is no prompt, and nothing is missing of a whole token's mass
    ops += under(TOGETHER["prompt"], text, "alone") + under(None, text, "off")
    outcome = succeeded(on_engine(run("r", model, ops, "min", **F32)))
    counted = outcome.ops("r", "loss_counters")
    exact = reference[f"{model}/off"]
    for rule in (*TOGETHER, *WITH_MASS):
        want = reference[f"{model}/{rule}"]
        assert np.abs(outcome.arrays[f"r/{rule}"] - want).max() <= tolerance, rule
        assert np.abs(want - exact).max() > 20 * tolerance, rule
    for i, rule in enumerate(TOGETHER):
        assert counted[i]["n_dropped"] == reference[f"{model}/{rule}/n_dropped"] > 0, rule
    assert_same_bits(outcome.arrays["r/alone"], outcome.arrays["r/off"], "a token alone")


OFF_RULES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "drop": {"drop": 0.0},
    "little-on-miss": {"little_on_miss": 8},
    "buddy": {"substitute": oracle.BUDDY, "tau": 1.0},
    "live": {"substitute": oracle.LIVE, "margin": 0.0},
    "prior": {"substitute": oracle.PRIOR, "prior": 0.0},
    # looked at, and nothing found: the scores are connected, and every expert is examined
    "no margin": {"substitute": oracle.LIVE, "margin": 1e-6},
    "all": {"drop": 1e-9, "little_on_miss": 8, "substitute": oracle.PRIOR, "prior": 1e-9},
}


@pytest.mark.parametrize("model", ["qwen3moe", "olmoe", "deepseek3", "gpt-oss-mxfp4", "qwen2moe-q8_0"])
def test_off_and_thresholds_at_zero_are_the_same_bits(model: str) -> None:
    base = model.split("-q8")[0].removesuffix("-mxfp4")
    text = tokens(16, 3)
    ops = [*set_up(base), {"op": "steps", "tokens": text, "pos": 0, "save": "never set"}]
    for rule, rules in OFF_RULES.items():
        ops += under(rules, text, rule)
    # and a prompt under a rule that would do much to it
    prompt = {"op": "decode", "tokens": text, "save": "prompt"}
    ops += [{"op": "loss", "rules": None}, {"op": "clear"}, {**prompt, "save": "exact prompt"}]
    ops += [{"op": "loss", "rules": {"drop": 4.0}, "lossy": False}, {"op": "clear"}, prompt]
    outcome = succeeded(on_engine(run("r", model, ops, "40%")))
    for rule in OFF_RULES:
        assert_same_bits(outcome.arrays[f"r/{rule}"], outcome.arrays["r/never set"], rule)
    assert_same_bits(outcome.arrays["r/prompt"], outcome.arrays["r/exact prompt"], "a prompt loses nothing")
    examined = dict(zip(OFF_RULES, outcome.ops("r", "loss_counters"), strict=True))
    assert examined["no margin"]["n_missing"] > 0
    assert examined["all"]["n_missing"] > 0


def test_tokens_of_a_batch_lose_each_by_itself() -> None:
    """A prompt's tokens beside those of a decode, as many sequences have them; the mask is of one decode."""
    model, n = "olmoe", 10
    text = tokens(2 * n, 3)
    batch = {
        "op": "decode", "tokens": text, "seqs": [i % 2 for i in range(2 * n)],
        "pos": [i // 2 for i in range(2 * n)],
    }  # fmt: skip
    rules = {"op": "loss", "rules": {"drop": 1.0}, "lossy": False}
    outcome = succeeded(on_engine(run("r", model, [
        *set_up(model), {**batch, "save": "exact"}, {"op": "clear"},
        {**rules, "lossy": True}, {**batch, "save": "all"}, {"op": "clear"},
        rules, {"op": "batch_lossy", "lossy": [i % 2 for i in range(2 * n)]}, {**batch, "save": "mixed"},
        {"op": "clear"}, {**batch, "save": "after"},
    ], n_seq_max=2, n_ctx=512, **F32)))  # fmt: skip
    exact, everyone, mixed = (outcome.arrays[f"r/{name}"] for name in ("exact", "all", "mixed"))
    tolerance = tiny_models.MODELS[model].tolerance
    assert np.abs(mixed[0::2] - exact[0::2]).max() <= tolerance
    assert np.abs(mixed[1::2] - everyone[1::2]).max() <= tolerance
    assert np.abs(everyone - exact).max() > 20 * tolerance
    assert_same_bits(outcome.arrays["r/after"], exact, "the decode after the mask")


REFUSED: dict[str, dict[str, Any]] = {
    "drop must be": {"drop": -0.5},
    "tau must be": {"tau": 2.0},
    "prior must be": {"substitute": oracle.PRIOR, "prior": 0.31},
    "prompt_drop must be": {"prompt_drop": 1.5},
    "unknown rule": {"substitute": 9},
    "must not be negative": {"keep": -1},
    "keeps at least": {"substitute": oracle.PRIOR, "keep": 0},
}


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model = "qwen3moe"
    step = {"op": "steps", "tokens": tokens(6, 1), "pos": 0}
    spec = tiny_models.MODELS[model]
    replay = np.zeros((1, spec.config["num_hidden_layers"], spec.top_k), int) + np.arange(spec.top_k)
    ops: list[dict[str, Any]] = [{**step, "save": "before"}, {"op": "clear"}]
    ops += [{"op": "loss", "rules": rules, "lossy": False} for rules in REFUSED.values()]
    ops += [{"op": "loss", "rules": {"substitute": oracle.BUDDY}}]  # none have been set
    buddies = {"experts": [[[spec.n_expert]]], "shares": [[[0.5]]], "tau": [0.5]}
    ops += [{"op": "buddies", **buddies}, {"op": "loss_residency", "resident": [[1]]}]
    ops += [{**step, "save": "after"}, {"op": "clear"}]
    ops += [{"op": "loss", "rules": {"substitute": oracle.LIVE}}, {"op": "replay", "ids": replay.tolist()}]
    ops += [{"op": "loss", "rules": None}, {"op": "replay", "ids": replay.tolist()}]
    ops += [{"op": "loss", "rules": {"substitute": oracle.LIVE}}]
    outcome = on_engine(run("r", model, ops, "40%"))
    told = outcome.ops("r", "loss")
    for text, answer in zip(REFUSED, told, strict=False):
        assert (answer["status"], text in answer["error"]) == (ARGUMENT, True), answer
    assert (told[len(REFUSED)]["status"], "buddies" in told[len(REFUSED)]["error"]) == (STATE, True)
    assert [op["status"] for op in outcome.ops("r", "buddies")] == [ARGUMENT]
    assert [op["status"] for op in outcome.ops("r", "loss_residency")] == [ARGUMENT]
    assert [op["status"] for op in outcome.ops("r", "replay")] == [STATE, 0]
    assert told[-1]["status"] == STATE
    assert_same_bits(outcome.arrays["r/after"], outcome.arrays["r/before"], "after refused calls")


@pytest.mark.parametrize("segments", [1, 4])
def test_the_store_says_what_is_missing_and_reads_what_is_displaced(segments: int, tmp_path: Path) -> None:
    """Fewer bytes on demand; what is displaced twice comes while the disk is idle, and is counted."""
    import layout_files

    path = layout_files.write_per_expert(tiny_models.path("olmoe"), tmp_path / "m.gguf", segments)
    text = tokens(40, 2)
    steps = {"op": "steps", "tokens": text, "pos": 0}

    def lossy(**rules: Any) -> list[dict[str, Any]]:
        return [{"op": "loss", "rules": rules}, steps, {"op": "loss_counters", "until_read": True}]

    count = [{"op": "counters"}, {"op": "residency", "save": "there"}]
    outcome = succeeded(on_engine(
        run("exact", path, [steps, *count], "40%"),
        run("drop", path, [*lossy(drop=1.0, admit=0), *count], "40%"),
        run("admit", path, [*lossy(drop=1.0, admit=2), *count], "40%"),
        run("all", path, [*lossy(drop=1.0), *count], 0),
        run("slots for all", path, [*steps_twice(steps, lossy), *count], 1 << 60),
    ))  # fmt: skip
    counters = {name: outcome.ops(name, "counters")[0] for name in ("exact", "drop", "admit")}
    loss = {name: outcome.ops(name, "loss_counters")[0] for name in ("drop", "admit", "all", "slots for all")}
    assert counters["drop"]["n_misses"] < counters["exact"]["n_misses"]
    assert loss["drop"]["n_dropped"] > 0
    assert loss["drop"]["n_admitted"] == 0
    # what was missing and not dropped was read, and nothing else
    left = loss["drop"]["n_missing"] - loss["drop"]["n_dropped"]
    assert counters["drop"]["n_misses"] == segments * left or segments > 1
    assert loss["admit"]["n_admitted"] > 0
    info = outcome.runs["admit"]["info"]
    of_one = info["expert_bytes"] // (info["n_layer_moe"] * info["n_expert"] * segments)
    assert loss["admit"]["bytes_admitted"] == of_one * loss["admit"]["n_admitted"]
    read = counters["admit"]
    assert read["bytes_read"] - read["bytes_read_demand"] >= loss["admit"]["bytes_admitted"]
    assert read["resident_bytes_peak"] <= info["budget_bytes"]
    # where everything is there nothing is missing
    assert loss["all"]["n_missing"] == loss["slots for all"]["n_missing"] == 0
    assert loss["all"]["n_layers"] == len(text) * info["n_layer_moe"]


def steps_twice(steps: dict[str, Any], lossy: Any) -> list[dict[str, Any]]:
    return [steps, {"op": "clear"}, *lossy(drop=1.0)]


def test_a_rule_without_a_message_ends_with_its_counters() -> None:
    """mobile_reset_counters starts the ladder's anew, too."""
    ops = [
        *set_up("olmoe"),
        {"op": "loss", "rules": {"drop": 2.0}},
        {"op": "steps", "tokens": tokens(4, 1), "pos": 0},
    ]
    ops += [{"op": "loss_counters"}, {"op": "reset_counters"}, {"op": "loss_counters"}]
    first, second = succeeded(on_engine(run("r", "olmoe", ops, "40%"))).ops("r", "loss_counters")
    assert first["n_dropped"] > 0
    assert first["moved_weight"] > 0
    assert all(second[name] == 0 for name in COUNTS)


def test_what_each_token_of_a_batch_lost_is_known() -> None:
    """Of three texts in one decode two may lose: each as it does alone, and together what is counted."""
    model, text = "olmoe", tokens(3, 4)
    rule = {"op": "loss", "rules": {"drop": 2.0}, "lossy": False}
    ops = set_up(model)
    for token in text:
        ops += [{"op": "clear"}, {"op": "reset_counters"}, {**rule, "lossy": True}]
        ops += [{"op": "decode", "tokens": [token]}, {"op": "token_loss", "i": 0}, {"op": "loss_counters"}]
    together = {"op": "decode", "tokens": text, "pos": [0] * 3, "seqs": [0, 1, 2]}
    ops += [
        rule,
        {"op": "clear"},
        {"op": "reset_counters"},
        {"op": "batch_lossy", "lossy": [1, 0, 1]},
        together,
    ]
    ops += [*({"op": "token_loss", "i": i} for i in (0, 1, 2, 99)), {"op": "loss_counters"}]
    ops += [{"op": "clear"}, {"op": "decode", "tokens": [text[0]]}, {"op": "token_loss", "i": 0}]
    settings: dict[str, Any] = {"n_seq_max": 3, "kv_unified": True, **F32}
    outcome = succeeded(on_engine(run("r", model, ops, "min", **settings)))
    each, beside = outcome.ops("r", "token_loss")[:3], outcome.ops("r", "token_loss")[3:6]
    for i, (alone, counted) in enumerate(zip(each, outcome.ops("r", "loss_counters"), strict=False)):
        assert alone["n_dropped"] > 0
        for name in COUNTS:
            assert alone[name] == counted[name]
            assert beside[i][name] == pytest.approx(0 if i == 1 else alone[name], rel=1e-4)
    for name in COUNTS:
        both = beside[0][name] + beside[2][name]
        assert outcome.ops("r", "loss_counters")[3][name] == pytest.approx(both)
    unknown, later = outcome.ops("r", "token_loss")[6:]
    assert unknown["n_layers"] == later["n_layers"] == 0, "what was lost is the last decode's"
    refused = on_engine(run("r", model, [{"op": "token_loss", "i": -1}], "min")).ops("r", "token_loss")[0]
    assert refused["status"] == ARGUMENT


def test_a_budget_below_a_layer_is_legal_where_passes_ask_for_less() -> None:
    """And a pass that asks for more fails with a text, and the next one does not."""
    model, spec = "olmoe", tiny_models.MODELS["olmoe"]
    text = tokens(12, 4)
    step = {"op": "steps", "tokens": text, "pos": 0, "save": "steps"}
    prompt = {"op": "decode", "tokens": tokens(30, 5)}
    at_once = {"n_at_once": spec.top_k}
    info = succeeded(on_engine(run("all", model, [step], 0))).runs["all"]["info"]
    few = info["budget_min_bytes"] * 5 // 8
    outcome = on_engine(
        run("all", model, [step], 0), run("refused", model, [], few),
        run("few", model, [prompt, {"op": "clear"}, step, {"op": "counters"}], few, mobile=at_once),
        run("too few", model, [], few // 3, mobile=at_once),
    )  # fmt: skip
    assert "all 16 experts of one layer" in outcome.runs["refused"]["load_error"]
    assert "8 experts or segments of one layer" in outcome.runs["too few"]["load_error"]
    assert outcome.ops("few", "decode")[0]["rc"] != 0
    assert "more experts are needed at once" in outcome.ops("few", "decode")[0]["error"]
    assert_same_bits(outcome.arrays["few/steps"], outcome.arrays["all/steps"], "under half a layer")
    assert outcome.ops("few", "counters")[0]["resident_bytes_peak"] <= few
