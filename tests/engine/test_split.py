"""Leading segments in the engine: a split changes what is read, and only the rung what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layout_files
import numpy as np
import pytest
import tiny_models
from engine_jobs import assert_same_bits, on_engine, run, succeeded, tokens

S, N_LAYER, N_EXPERT = 4, 4, 8
TEXT = tokens(24, 3)
F32: dict[str, Any] = {"f32_kv": True}
STATE, ARGUMENT = -2, -1  # enum mobile_status
STEPS = {"op": "steps", "tokens": TEXT, "pos": 0, "save": "steps"}
SPLITS: dict[str, dict[str, Any]] = {
    "whole": {"kept": None, "shares": None},
    "first": {"kept": [1] * N_LAYER, "shares": None},
    "by layer": {"kept": [1, 2, 3, 4], "shares": [0.4, 0.3, 0.2, 0.1]},
    "wishes": {"kept": None, "shares": [0.7, 0.1, 0.1, 0.1]},
}


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral's experts in segments, their neurons as they were."""
    out = tmp_path_factory.mktemp("split") / "m.gguf"
    return layout_files.write_per_expert(tiny_models.path("mixtral"), out, S)


def close(actual: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_split_changes_no_bit(segmented: Path, prefetch: int) -> None:
    """Nor do the logits differ from whole experts' but in the order of a sum; prompt and single tokens."""
    ops = [
        {"op": "set_prefetch", "mode": prefetch},
        {"op": "decode", "tokens": tokens(30, 5), "save": "prompt"},
        {**STEPS, "pos": 30},
        {"op": "counters"},
    ]
    jobs = [run("stock", tiny_models.path("mixtral"), ops, 0, **F32)]
    for name, split in SPLITS.items():
        jobs += [
            run(f"{name} {budget}", segmented, [{"op": "split", **split}, *ops], budget, **F32)
            for budget in ("min", "50%")
        ]
    outcome = succeeded(on_engine(*jobs))
    for name in SPLITS:
        for budget in ("min", "50%"):
            for saved in ("prompt", "steps"):
                ours = outcome.arrays[f"{name} {budget}/{saved}"]
                assert_same_bits(ours, outcome.arrays[f"whole {budget}/{saved}"], f"{name}, {budget}")
                assert close(ours, outcome.arrays[f"stock/{saved}"])
    misses = {name: outcome.ops(f"{name} 50%", "counters")[0]["n_misses"] for name in SPLITS}
    assert len(set(misses.values())) > 1, "no split changed what is read"
    peaks = [outcome.ops(f"{name} 50%", "counters")[0]["resident_bytes_peak"] for name in SPLITS]
    assert max(peaks) <= outcome.runs["whole 50%"]["info"]["budget_bytes"]


def test_a_split_may_change_between_tokens(segmented: Path) -> None:
    ops: list[dict[str, Any]] = []
    for i, token in enumerate(TEXT):
        ops += [
            {"op": "split", **list(SPLITS.values())[i % len(SPLITS)]},
            {"op": "steps", "tokens": [token], "pos": i, "save": f"step{i}"},
        ]
    outcome = succeeded(
        on_engine(
            run("changing", segmented, ops, "50%", **F32), run("never", segmented, [STEPS], "50%", **F32)
        )
    )
    found = np.concatenate([outcome.arrays[f"changing/step{i}"] for i in range(len(TEXT))])
    assert_same_bits(found, outcome.arrays["never/steps"], "a changing split")


REFUSED: dict[str, dict[str, Any]] = {
    "for each of this model's 4 layers": {"kept": [1] * 3, "shares": None},
    "cannot keep 0 of 4 segments": {"kept": [1, 0, 1, 1], "shares": None},
    "cannot keep 5 of 4 segments": {"kept": [1, 1, 1, 5], "shares": None},
    "cannot have a share of": {"kept": None, "shares": [0.5, 0.5, 0.5, 1.5]},
}


def test_what_cannot_be_is_refused(segmented: Path) -> None:
    ops: list[dict[str, Any]] = [{"op": "split", **split} for split in REFUSED.values()]
    ops += [{"op": "split", "on_device": True, **SPLITS["first"]}, STEPS]
    outcome = on_engine(
        run("r", segmented, ops, "min", **F32), run("plain", segmented, [STEPS], "min", **F32)
    )
    told = outcome.ops("r", "split")
    for text, answer in zip(REFUSED, told, strict=False):
        assert (answer["status"], text in answer["error"]) == (ARGUMENT, True), answer
    assert (told[-1]["status"], "no slots" in told[-1]["error"]) == (STATE, True)
    assert_same_bits(outcome.arrays["r/steps"], outcome.arrays["plain/steps"], "after refused calls")


# the rung

KEEP = {"keep": 1, "admit": 0}
HALF = [[1] * S] * (N_EXPERT // 2) + [[1] * (S // 2) + [0] * (S // 2)] * (N_EXPERT // 2)  # of a layer


def without_rest(source: Path, out: Path) -> Path:
    """The same model with nothing behind the first half of neurons in the second half of the experts."""

    def change(tensors: list[layout_files.Tensor]) -> list[layout_files.Tensor]:
        changed = []
        for name, data, kind in tensors:
            if name.endswith("ffn_down_exps.weight"):
                data = data.copy()
                data[N_EXPERT // 2 :, :, data.shape[2] // 2 :] = 0
            changed.append((name, data, kind))
        return changed

    return layout_files.rewrite(source, out, change)


def test_the_rung_computes_the_segments_that_are_there(segmented: Path, tmp_path: Path) -> None:
    """Held against a model whose experts are no more than that."""
    source = tiny_models.path("mixtral")
    halved = without_rest(source, tmp_path / "halved.gguf")
    script = {"op": "loss_residency", "resident": [HALF] * N_LAYER}
    lossy = {"op": "loss", "rules": {"partial": 0.5, "keep": 0, "admit": 0}}
    outcome = succeeded(on_engine(
        run("rung", segmented, [script, lossy, STEPS, {"op": "loss_counters"}], "min", **F32),
        run("halved", halved, [STEPS], "min", **F32), run("exact", source, [STEPS], "min", **F32),
        run("more wanted", segmented, [
            script, {"op": "loss", "rules": {"partial": 0.75, "keep": 0}}, STEPS, {"op": "loss_counters"},
        ], "min", **F32),
    ))  # fmt: skip
    assert close(outcome.arrays["rung/steps"], outcome.arrays["halved/steps"])
    assert not close(outcome.arrays["rung/steps"], outcome.arrays["exact/steps"])
    assert close(outcome.arrays["more wanted/steps"], outcome.arrays["exact/steps"])
    counted, none = (outcome.ops(name, "loss_counters")[0] for name in ("rung", "more wanted"))
    assert counted["n_partial"] == counted["n_missing"] > 0
    assert counted["moved_weight"] > 0
    assert none["n_partial"] == 0 < none["n_missing"]


def test_the_rung_reads_less_and_spares_the_heaviest(segmented: Path) -> None:
    """With the store's own residency; off and where nothing is in part the bits are the exact ones."""
    split = {"op": "split", **SPLITS["first"]}
    count = [{"op": "counters"}, {"op": "loss_counters", "until_read": True}]

    def under(**rules: Any) -> list[dict[str, Any]]:
        return [split, {"op": "loss", "rules": rules}, STEPS, *count]

    outcome = succeeded(on_engine(
        run("exact", segmented, [split, STEPS, *count], "50%", **F32),
        run("off", segmented, under(partial=0.0), "50%", **F32),
        run("rung", segmented, under(partial=0.25, keep=1, admit=0), "50%", **F32),
        run("admits", segmented, under(partial=0.25, keep=1, admit=2), "50%", **F32),
        run("all spared", segmented, under(partial=0.25, keep=2), "50%", **F32),
        run("whole", "mixtral", [
            {"op": "loss", "rules": {"partial": 0.25, "keep": 0}}, STEPS, *count,
        ], "50%", **F32),
        run("whole exact", "mixtral", [STEPS], "50%", **F32),
    ))  # fmt: skip
    for name in ("off", "all spared"):
        assert_same_bits(outcome.arrays[f"{name}/steps"], outcome.arrays["exact/steps"], name)
    assert_same_bits(outcome.arrays["whole/steps"], outcome.arrays["whole exact/steps"], "whole experts")
    store = {name: outcome.ops(name, "counters")[0] for name in ("exact", "rung", "admits")}
    loss = {name: outcome.ops(name, "loss_counters")[0] for name in ("rung", "admits", "all spared", "whole")}
    assert store["rung"]["n_misses"] < store["exact"]["n_misses"]
    assert loss["rung"]["n_partial"] > 0
    assert loss["rung"]["n_admitted"] == 0
    assert loss["admits"]["n_admitted"] > 0
    assert loss["all spared"]["n_partial"] == loss["whole"]["n_partial"] == 0
    # the lighter of two experts, of which something was there
    assert 0 < loss["rung"]["moved_weight"] < 0.5 * loss["rung"]["n_partial"]
