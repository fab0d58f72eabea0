"""What a device has to give: the run on the CPU alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import gguf
import numpy as np
import tiny_models
from engine_jobs import on_engine, run, succeeded, tokens

PROMPT = tokens(40, 31)  # more than fit the cache's batches


N_STEPS = 64


def greedy(n: int = N_STEPS) -> list[dict[str, Any]]:
    return [{"op": "clear"}, {"op": "greedy", "tokens": PROMPT, "n": n, "save": "last"}]


@cache
def on_cpu(model: str, n: int = N_STEPS) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the last logits of the CPU alone."""
    outcome = succeeded(on_engine(run("cpu", model, greedy(n), 0)))
    return outcome.ops("cpu", "greedy")[0]["tokens"], outcome.arrays["cpu/last"]


def assert_as_on_cpu(outcome: Any, name: str, model: str) -> None:
    expected, logits = on_cpu(model)
    for result in outcome.ops(name, "greedy"):
        assert result["tokens"] == expected, name
    np.testing.assert_allclose(outcome.arrays[f"{name}/last"], logits, atol=0.01, err_msg=name)


def expert_bytes(model: str) -> tuple[int, int]:
    """Of one expert, biases included: the smallest and the largest of all layers."""
    by_layer: dict[int, int] = {}
    for part in sorted(tiny_models.path(model).parent.glob("*.gguf")):
        for tensor in gguf.GGUFReader(part).tensors:
            if "_exps." in tensor.name:
                layer = int(tensor.name.split(".")[1])
                by_layer[layer] = by_layer.get(layer, 0) + int(tensor.n_bytes)
    n_expert = tiny_models.MODELS[model].n_expert
    return min(by_layer.values()) // n_expert, max(by_layer.values()) // n_expert
