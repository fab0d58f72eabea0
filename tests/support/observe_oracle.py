"""Runs a tiny Qwen3-MoE in Transformers and sums the squares of every weight's input, expert by expert.

Run as a script, because torch does not belong into the pytest process. stdin: {"spec", "tokens", "out"},
``spec`` as in ``tiny_models.TinyModel``. The npz at ``out`` holds "NAME" [n_mat, n_row] and "NAME/counts"
[n_mat] by the weight's name in the GGUF, "ids/L" and "weights/L" [n_tokens, k], and "norms/L" [n_expert,
n_ff], the squared norms of the down projections' columns.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_build import make_checkpoint

LINEAR = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def main() -> int:
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model: Any = make_checkpoint(job["spec"], Path(scratch))
    found: dict[str, np.ndarray] = {}

    def watch(module: torch.nn.Module, name: str) -> None:
        def hook(_module: Any, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0].reshape(-1, arguments[0].shape[-1]).double().numpy()
            found[f"{name}.weight"] = (rows**2).sum(0)[None]
            found[f"{name}.weight/counts"] = np.array([len(rows)])

        module.register_forward_pre_hook(hook)

    def watch_experts(module: Any, layer: int) -> None:
        def hook(_module: Any, arguments: tuple[Any, ...]) -> None:
            hidden, ids, weights = (a.double() if a.is_floating_point() else a for a in arguments)
            found[f"ids/{layer}"], found[f"weights/{layer}"] = ids.numpy(), weights.numpy()
            n_expert = module.num_experts
            outer = np.zeros((n_expert, hidden.shape[1]))
            inner = np.zeros((n_expert, module.intermediate_dim))
            counts = np.zeros(n_expert)
            for token, experts in enumerate(ids.tolist()):
                for expert in experts:
                    gate, up = (module.gate_up_proj[expert].double() @ hidden[token]).chunk(2)
                    outer[expert] += hidden[token].numpy() ** 2
                    inner[expert] += (module.act_fn(gate) * up).numpy() ** 2
                    counts[expert] += 1
            for name, sums in (("gate", outer), ("up", outer), ("down", inner)):
                found[f"blk.{layer}.ffn_{name}_exps.weight"] = sums
                found[f"blk.{layer}.ffn_{name}_exps.weight/counts"] = counts

        module.register_forward_pre_hook(hook)

    for layer, block in enumerate(model.model.layers):
        for name, gguf_name in LINEAR.items():
            watch(block.get_submodule(name), f"blk.{layer}.{gguf_name}")
        watch_experts(block.mlp.experts, layer)
    watch(model.lm_head, "output")
    with torch.no_grad():
        model(torch.tensor([job["tokens"]]), use_cache=False)
    for layer, block in enumerate(model.model.layers):
        columns = block.mlp.experts.down_proj.detach().double()
        found[f"norms/{layer}"] = (columns**2).sum(1).numpy()
    np.savez(job["out"], **found)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
