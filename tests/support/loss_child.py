"""Transformers with the ladder of lossy rules behind its routers, for a scripted set of resident experts.

stdin: {"out": npz path, "models": [{"name", "spec", "scoring", "normalised", "resident", "buddies",
"shares", "tau", "rules", "mass", "parts"}]}. Writes logits [n_tokens, n_vocab] as "model/rule" for every
rule, and what the oracle counted as "model/rule/NAME". A dropped expert keeps its place with a weight of 0.
"parts", if it is there, says which segments of experts are, [n_layer][n_expert][n_segments]: the other
neurons of an expert that is computed in part do nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import loss_oracle as oracle
import numpy as np
import torch
import transformers
from tiny_build import randomize, reference_tokens
from transformers_child import answer

# by the router's gating: probabilities of its logits, those logits again, and what weights are proportional
# to
SCORING: dict[str, tuple[Any, Any, Any]] = {
    "softmax": (lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum(), np.log, lambda p: p),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), lambda p: np.log(p / (1 - p)), lambda p: p),
    "chosen": (lambda x: x, lambda p: p, np.exp),  # a softmax over the chosen ones' logits
}


class Router:
    """A forward hook of one layer's router."""

    def __init__(self, entry: dict[str, Any], layer: int) -> None:
        self.entry, self.layer = entry, layer
        self.state: oracle.Layer | None = None
        self.rule = ""
        self.in_part = torch.zeros(0)  # [n_tokens, k] of the last pass: 1 where only what is there runs

    @property
    def parts(self) -> np.ndarray | None:
        """Which segments of the layer's experts are there, bool [n_expert, n_segments]."""
        parts = self.entry.get("parts")
        return None if parts is None else np.array(parts[self.layer], bool)

    def start(self, rule: str, rules: dict[str, Any]) -> oracle.Layer:
        entry, i = self.entry, self.layer
        self.rule = rule
        _, logit, mass = SCORING[entry["scoring"]]
        parts = self.parts
        resident = np.array(entry["resident"][i], bool) if parts is None else np.asarray(parts.all(-1))
        self.state = oracle.Layer(
            resident, rules, np.array(entry["buddies"][i]), np.array(entry["shares"][i], np.float32),
            entry["tau"][i], logit, mass, there=None if parts is None else parts.mean(-1),
        )  # fmt: skip
        return self.state

    def __call__(self, module: Any, _inputs: Any, output: Any) -> Any:
        assert self.state is not None
        logits, weights, indices = output
        ids, kept = indices.numpy().copy(), weights.numpy().astype(np.float64)
        rules = oracle.DEFAULTS | self.state.rules
        self.in_part = torch.zeros(weights.shape, dtype=weights.dtype)
        if rules["prompt_drop"] > 0:
            new, _moved = oracle.apply_together(rules, self.state.resident, ids, kept)
            own = np.where(new >= 0, kept, 0.0)
            if self.entry["normalised"]:
                own *= kept.sum(-1, keepdims=True) / own.sum(-1, keepdims=True)
            self.state.count("n_dropped", int((new < 0).sum()))
            return logits, torch.from_numpy(own).to(weights.dtype), torch.from_numpy(ids)
        for t in range(len(ids)):
            probs = SCORING[self.entry["scoring"]][0](logits[t].numpy().astype(np.float64)).astype(np.float32)
            bias = getattr(module, "e_score_correction_bias", None)
            scores = probs if bias is None else self.choosing(module, probs + bias.numpy())
            share = oracle.missing_share([ids[t]], self.state.resident)
            new, own = oracle.apply(
                self.state, ids[t], kept[t], probs=probs, scores=scores, time=float(t), share_missing=share
            )
            own = np.where(new >= 0, own, 0.0)
            self.in_part[t, list(self.state.in_part)] = 1.0
            if self.entry["normalised"] and own.sum() > 0:
                heaviest = np.sort(kept[t])[::-1][: self.entry["mass"].get(self.rule, 0)].sum()
                own *= kept[t].sum() / max(own.sum(), heaviest)
            ids[t], kept[t] = np.where(new >= 0, new, ids[t]), own
        return logits, torch.from_numpy(kept).to(weights.dtype), torch.from_numpy(ids)

    @staticmethod
    def choosing(module: Any, scores: np.ndarray) -> np.ndarray:
        """DeepSeek's: experts of the best groups, by their two best."""
        groups = scores.reshape(module.num_group, -1)
        best = np.argsort(-np.sort(groups, axis=-1)[:, -2:].sum(-1))[: module.topk_group]
        inside = np.isin(np.arange(module.num_group), best)
        return np.where(inside[:, None], groups, -np.inf).reshape(-1).astype(np.float32)


def in_part_too(experts: Any, router: Router) -> None:
    """Makes a layer's experts compute those that run in part by the neurons that are there."""
    parts = router.parts
    assert parts is not None
    some = copy.deepcopy(experts)
    n_neurons = some.down_proj.shape[-1]
    neurons = np.repeat(parts, n_neurons // parts.shape[-1], axis=-1)
    with torch.no_grad():
        some.down_proj *= torch.from_numpy(neurons)[:, None, :]

    def both(_module: Any, inputs: tuple[Any, ...], _output: Any) -> Any:
        hidden, ids, weights = inputs
        in_part = router.in_part
        return experts.forward(hidden, ids, weights * (1 - in_part)) + some(hidden, ids, weights * in_part)

    experts.register_forward_hook(both)


def logits_of(entry: dict[str, Any]) -> dict[str, np.ndarray]:
    spec = entry["spec"]
    config = getattr(transformers, spec["config_class"])(**spec["config"])
    config._attn_implementation = "eager"
    model = getattr(transformers, spec["model_class"])(config).float().eval()
    randomize(model, spec["seed"])
    routers = []
    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            layer = int(name.split("layers.")[1].split(".")[0])
            routers.append(Router(entry, layer))
            module.register_forward_hook(routers[-1])
            if entry.get("parts") is not None:
                in_part_too(model.get_submodule(name.rsplit(".", 1)[0] + ".experts"), routers[-1])
    tokens = torch.from_numpy(reference_tokens(spec["config"]["vocab_size"]))[None].long()
    found: dict[str, np.ndarray] = {}
    for rule, rules in entry["rules"].items():
        states = [router.start(rule, rules) for router in routers]
        with torch.no_grad():
            found[rule] = model(tokens, use_cache=False).logits[0].float().numpy()
        for name in {name for state in states for name in state.counts}:
            found[f"{rule}/{name}"] = np.array(sum(state.counts.get(name, 0) for state in states))
    return found


if __name__ == "__main__":
    raise SystemExit(answer(logits_of))
