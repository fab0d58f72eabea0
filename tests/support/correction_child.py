"""Transformers with fewer experts for some tokens, and an affine map of what those experts sum to.

stdin: {"out": npz path, "models": [{"name", "spec", "normalised", "k" [n_tokens] (0: all), "of" (the k that
is corrected), "scale", "shift" [n_layer][n_embd], "mass", "runs": {name: {"correct", "shifts", "turned"}},
"ways": [[k, mass]]}]}. A run corrects "little", "all" or "none" of the tokens, with shifts or without, by the
maps of layers that are off by "turned". Writes logits [n_tokens, n_vocab] as "model/run", and of what each
layer's experts sum to with all of them "model/big/LAYER" [n_tokens, n_embd], by ways
"model/little/WAY/LAYER".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tiny_build import randomize, reference_tokens
from transformers_child import answer


def kept(weights: np.ndarray, scores: np.ndarray, k: int, mass: int, normalised: bool) -> np.ndarray:
    """A token's weights [top_k] where only the k that were chosen first run, by plain arithmetic."""
    if k == 0 or k >= len(weights):
        return weights
    first = np.argsort(-scores, kind="stable")[:k]
    own = np.zeros_like(weights)
    own[first] = weights[first]
    if normalised:
        heaviest = np.sort(weights)[::-1][:mass].sum()
        own *= weights.sum() / max(own.sum(), heaviest)
    return own


class Layer:
    """Hooks of one layer: of its router, and of its experts."""

    def __init__(self, entry: dict[str, Any], n: int) -> None:
        self.entry, self.n = entry, n
        self.run: dict[str, Any] | None = None  # None: with all experts, and watched
        self.seen: dict[str, np.ndarray] = {}
        self.scores = np.zeros(0)  # that experts were chosen by

    def masked(self, weights: np.ndarray, ks: Sequence[int], mass: int) -> np.ndarray:
        rows = zip(weights, self.scores, ks, strict=True)
        return np.stack(
            [kept(row, np.asarray(scores), k, mass, self.entry["normalised"]) for row, scores, k in rows]
        )

    def route(self, module: Any, _inputs: Any, output: Any) -> Any:
        logits, weights, ids = output
        bias = getattr(module, "e_score_correction_bias", None)
        chosen_by = weights if bias is None else (logits.sigmoid() + bias).gather(-1, ids)
        self.scores = chosen_by.numpy()
        if self.run is None:
            return output
        new = self.masked(weights.numpy().astype(np.float64), self.entry["k"], self.entry["mass"])
        return logits, torch.from_numpy(new).to(weights.dtype), ids

    def sum(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        entry, run = self.entry, self.run
        if run is None:
            self.watch(module, inputs, output)
            return output
        at = (self.n + run["turned"]) % len(entry["scale"])
        scale, shift = (torch.tensor(entry[name][at]) for name in ("scale", "shift"))
        rows = torch.tensor([run["correct"] == "all" or k == entry["of"] for k in entry["k"]])
        if run["correct"] == "none":
            rows[:] = False
        flat = output.reshape(len(rows), -1)
        fixed = flat * scale + (shift if run["shifts"] else 0)
        return torch.where(rows[:, None], fixed, flat).reshape(output.shape)

    def watch(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        hidden, ids, weights = inputs
        self.seen[f"big/{self.n}"] = output.reshape(-1, output.shape[-1]).numpy()
        for i, (k, mass) in enumerate(self.entry["ways"]):
            new = self.masked(weights.numpy().astype(np.float64), [k] * len(weights), mass)
            little = module.forward(hidden, ids, torch.from_numpy(new).to(weights.dtype))
            self.seen[f"little/{i}/{self.n}"] = little.reshape(-1, little.shape[-1]).numpy()


def arrays_of(entry: dict[str, Any]) -> dict[str, np.ndarray]:
    spec = entry["spec"]
    config = getattr(transformers, spec["config_class"])(**spec["config"])
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = getattr(transformers, spec["model_class"])(config).float().eval()
    randomize(model, spec["seed"])
    layers: dict[int, Layer] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        if not kind.endswith(("topkrouter", "experts")) or "layers." not in name:
            continue
        n = int(name.split("layers.")[1].split(".")[0])
        layer = layers.setdefault(n, Layer(entry, n))
        module.register_forward_hook(layer.route if kind.endswith("topkrouter") else layer.sum)
    tokens = torch.from_numpy(reference_tokens(spec["config"]["vocab_size"]))[None].long()
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        model(tokens, use_cache=False)
        for layer in layers.values():
            found |= layer.seen
        for name, run in entry["runs"].items():
            for layer in layers.values():
                layer.run = run
            found[name] = model(tokens, use_cache=False).logits[0].float().numpy()
    return found


if __name__ == "__main__":
    raise SystemExit(answer(arrays_of))
