"""How well a layer's router, fed with an earlier layer's state, tells its experts: on the demo model.

python -m mobile_gguf.bench.router_prediction TEXT.gz [TEXT.gz]
"""

from __future__ import annotations

import ctypes
import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import EngineError

from .child import _Tensor

N_BATCH = 512  # tokens of one context
N_TOKENS = 2048  # of each text
NAMES = ("ffn_norm", "ffn_inp", "ffn_moe_topk", "l_out")

Floats = npt.NDArray[np.float32]
States = dict[tuple[str, int], npt.NDArray[Any]]  # (name, layer) -> [n_tokens, n]


def observe(model_path: Path, texts: list[bytes]) -> States:
    """Inputs, outputs and routed ids of every layer over the texts; raises EngineError."""
    from llama_cpp import llama_cpp as library

    llama_cpp: Any = library

    seen: dict[tuple[str, int], list[npt.NDArray[Any]]] = {}

    def look(address: int, asking: bool, _user_data: Any) -> bool:
        tensor = _Tensor.from_address(address)
        name, _, layer = tensor.name.decode(errors="replace").rpartition("-")
        if name not in NAMES or not layer.isdigit():
            return not asking
        if not asking:
            kind = np.int32 if name == "ffn_moe_topk" else np.float32
            n, n_tokens = tensor.ne[0], tensor.ne[1]
            rows = [
                np.frombuffer(ctypes.string_at(tensor.data + token * tensor.nb[1], 4 * n), kind)
                for token in range(n_tokens)
            ]
            seen.setdefault((name, int(layer)), []).append(np.stack(rows))
        return True

    callback = llama_cpp.ggml_backend_sched_eval_callback(look)
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers, model_params.use_extra_bufts = 0, False
    model = llama_cpp.llama_model_load_from_file(str(model_path).encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = N_BATCH
    params.cb_eval = callback
    ctx = llama_cpp.llama_init_from_model(model, params) if model else None
    if not ctx:
        raise EngineError(f"{model_path} does not load")
    vocab = llama_cpp.llama_model_get_vocab(model)
    for text in texts:
        tokens = (llama_cpp.llama_token * len(text))()
        n = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, len(text), True, False)
        for start in range(0, min(n, N_TOKENS) - N_BATCH + 1, N_BATCH):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
            batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
            batch.n_tokens = N_BATCH
            for i in range(N_BATCH):
                batch.token[i], batch.pos[i], batch.logits[i] = tokens[start + i], i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            status = llama_cpp.llama_decode(ctx, batch)
            llama_cpp.llama_batch_free(batch)
            if status != 0:
                raise EngineError(f"decoding failed with status {status}")
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)
    return {key: np.concatenate(parts) for key, parts in seen.items()}


def read_weights(model_path: Path) -> dict[str, Floats]:
    """Router and norm weights by tensor name."""
    import gguf

    wanted = ("ffn_gate_inp.weight", "ffn_norm.weight")
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(model_path).tensors if t.name.endswith(wanted)}


def predictions(states: States, weights: dict[str, Floats], layer: int, target: int) -> dict[str, Floats]:
    """Scores [n_tokens, n_expert] of ``target``'s experts by predictor."""
    router, norm = weights[f"blk.{target}.ffn_gate_inp.weight"], weights[f"blk.{target}.ffn_norm.weight"]

    def normed(state: Floats) -> Floats:
        return state / np.sqrt((state * state).mean(1, keepdims=True) + 1e-5) * norm

    routed, before = states["ffn_moe_topk", target], states["ffn_moe_topk", layer]
    n_expert = len(router)
    here, there = (np.zeros((len(routed), n_expert), np.float32) for _ in range(2))
    np.put_along_axis(here, before, 1, 1)
    np.put_along_axis(there, routed, 1, 1)
    known = np.arange(len(routed)) // N_BATCH % 2 == 0
    chance = here[known].T @ there[known] / np.maximum(here[known].sum(0), 1)[:, None]
    return {
        "router on the FFN input": states["ffn_norm", layer] @ router.T,
        "router on its own norm of the FFN's residual": normed(states["ffn_inp", layer]) @ router.T,
        "router on its own norm of the layer's output": normed(states["l_out", layer]) @ router.T,
        "transitions": here @ chance,
        "hotness": np.tile(there[known].mean(0), (len(routed), 1)),
    }


def main() -> int:
    """Print a Markdown table: the share of predicted experts that were routed to, on held-out tokens."""
    from mobile_gguf.demo import ensure_demo

    path = ensure_demo()
    texts = [gzip.decompress(Path(name).read_bytes())[2000:60_000] for name in sys.argv[1:]]
    states = observe(path, texts)
    weights = read_weights(path)
    n_layer = 1 + max(layer for _, layer in states)
    k = states["ffn_moe_topk", 0].shape[1]
    sys.stdout.write(f"| predictor | layers ahead | top-{k} | top-{k // 2} |\n|---|---|---|---|\n")
    for distance in (1, 2):
        shares: dict[str, list[tuple[float, float]]] = {}
        for layer in range(n_layer - distance):
            routed = states["ffn_moe_topk", layer + distance]
            held_out = np.arange(len(routed)) // N_BATCH % 2 == 1
            for name, scores in predictions(states, weights, layer, layer + distance).items():
                best = np.argsort(-scores, 1)[:, :k]
                right = (best[:, :, None] == routed[:, None, :]).any(-1)[held_out]
                shares.setdefault(name, []).append((right.mean(), right[:, : k // 2].mean()))
        for name, values in shares.items():
            all_k, half = np.mean(values, axis=0)
            sys.stdout.write(f"| {name} | {distance} | {all_k:.0%} | {half:.0%} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
