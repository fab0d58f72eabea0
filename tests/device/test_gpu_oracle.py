"""What the GPU's tests take for right and for wrong, on the CPU: files with a fault, and files that round."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import layout_files
import numpy as np
import pytest
import tiny_models
from device_oracle import CLOSE, follow
from engine_jobs import on_engine, run, succeeded
from engine_libs import Outcome
from gpu_oracle import FURTHEST, References

MODELS = ["qwen3moe", "gpt-oss", "qwen3moe-q4_k"]
F32 = gguf.GGMLQuantizationType.F32
Change = Callable[[list[layout_files.Tensor]], list[layout_files.Tensor]]


def rounded(tensors: list[layout_files.Tensor]) -> list[layout_files.Tensor]:
    """Weights of 10 bits of mantissa, as TensorFloat-32 has them; quantised ones as they are, in float32,
    where activations are not quantised."""
    out = []
    for name, data, kind in tensors:
        values = np.ascontiguousarray(gguf.quants.dequantize(data, kind), np.float32)
        if kind == F32 and values.ndim > 1:
            values = ((values.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
        out.append((name, values, F32))
    return out


def experts_of(layer: int, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Changes what the experts of a layer are, biases included: [n_expert, ...]."""
    pattern = re.compile(rf"blk\.{layer}\.ffn_(gate|up|down)_exps\.(weight|bias)")
    return lambda tensors: [
        (name, change(data.copy()) if pattern.fullmatch(name) else data, kind) for name, data, kind in tensors
    ]


def another_in(expert: int) -> Callable[[np.ndarray], np.ndarray]:
    """What a slot holds whose upload was forgotten: another expert."""

    def change(experts: np.ndarray) -> np.ndarray:
        experts[expert] = experts[(expert + 3) % len(experts)]
        return experts

    return change


FAULTS: dict[str, Change] = {
    "stale in the first layer": experts_of(0, another_in(2)),
    "stale in the second layer": experts_of(1, another_in(3)),
    "stale in the last layer": experts_of(3, another_in(5)),
    "permuted in the last layer": experts_of(3, lambda experts: np.roll(experts, 1, axis=0)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.mark.parametrize("model", MODELS)
def test_wrong_experts_are_seen_and_rounding_is_not(model: str, folder: Path) -> None:
    """The "GPU" is the CPU with a model that is rounded."""
    path = tiny_models.path(model)
    fewer = {"op": "set_k", "k": tiny_models.MODELS[model].top_k - 1}

    def of(name: str, change: Change) -> dict[str, Any]:
        return run(name, layout_files.rewrite(path, folder / f"{model} {name}.gguf", change), follow(), 0)

    outcome = succeeded(on_engine(
        run("exact", path, follow(), 0), of("rounded", rounded), run("fewer", path, [fewer, *follow()], 0),
        *(of(name, change) for name, change in FAULTS.items()),
    ))  # fmt: skip
    references = References(outcome.arrays["exact/rows"], outcome.arrays["rounded/rows"])
    assert references.apart.max() > 0
    for name in ("exact", "rounded"):
        references.assert_followed(outcome, name)
    for name in ("fewer", *FAULTS):
        with pytest.raises(AssertionError, match=f"{name}/rows: .* apart by"):
            references.assert_followed(outcome, name)
    # neither is the other's excuse: a row that both have otherwise
    with pytest.raises(AssertionError, match="apart by"):
        references.assert_close(references.on_cpu[:, ::-1], "reversed")


def test_one_value_of_a_poisoned_slot_is_seen() -> None:
    logits = np.zeros((40, 8), np.float32)
    spoilt = logits.copy()
    spoilt[7, 3] = np.nan
    References(logits, logits).assert_close(logits, "good")
    with pytest.raises(AssertionError, match="not finite"):
        References(logits, logits).assert_close(spoilt, "spoilt")


def test_the_gpus_own_rounding_has_a_bound() -> None:
    """However far the stock graph on the GPU is from the CPU, a wrong expert is further."""
    logits = np.zeros((40, 8), np.float32)
    for apart, close in ((0.0, CLOSE), (0.05, 0.15), (9.0, FURTHEST)):
        assert References(logits, logits + apart).close == pytest.approx(close)


def test_a_run_without_rows_is_no_success() -> None:
    with pytest.raises(AssertionError, match="saved no rows"):
        References(np.zeros((1, 2)), np.zeros((1, 2))).assert_followed(Outcome({"r": {"ops": []}}, {}), "r")
