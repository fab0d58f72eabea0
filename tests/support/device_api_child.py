"""Runs generations with and without devices in a process of its own, since a server once added stays known.

stdin: {"out": npz path, "runs": [{"name", "model", "options", "prompt", "n" or "forced", ...}]}; stdout: one
line with results by name. ``forced`` tokens are decoded one by one and their logits saved as the array
"name"; of n generated ones the logits that chose them, as "name-choices".
A run with ``stock`` set is llama-cpp-python's own, with all layers on the server that it names.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
from peak_memory import peak_resident_bytes

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.errors import MobileError


def forced_logits(
    llama: Any, run: Callable[[list[int]], object], prompt: list[int], tokens: list[int]
) -> np.ndarray:
    """Logits [1 + n, n_vocab] after a prompt and after each of ``tokens``."""
    from llama_cpp import llama_cpp as lib

    vocab: Any = lib.llama_model_get_vocab(llama.model)
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    rows = []
    for batch in [prompt, *([token] for token in tokens)]:
        run(batch)
        logits = lib.llama_get_logits_ith(llama.ctx, -1)
        rows.append(np.ctypeslib.as_array(logits, shape=(n_vocab,)).copy())
    return np.stack(rows)


def answer(
    model: mobile_gguf.Model, prompt: list[int], options: dict[str, Any]
) -> tuple[mobile_gguf.Reply, np.ndarray]:
    """A reply, and the logits [n, n_vocab] that chose its tokens."""
    rows: list[np.ndarray] = []
    reply = model.generate(prompt, on_chunk=lambda _: rows.append(np.array(model.last_logits())), **options)
    return reply, np.stack(rows)


def watched(spec: dict[str, Any]) -> int:
    """Address space of the process that the run watches: what was allocated there, used or not."""
    if "watch" not in spec:
        return 0
    status = Path(f"/proc/{spec['watch']}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:")) * 1024


def run_ours(spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        with mobile_gguf.load(spec["model"], threads=1, threads_batch=1, **spec.get("options", {})) as model:
            result: dict[str, Any] = {"notices": model.notices, "answers": []}
            result["watched_at_load"] = watched(spec)
            for placement in spec.get("placements", [None]):
                if placement is not None:
                    backend_of(model).device.calls.set_placement(placement)
                if "forced" in spec:
                    backend_of(model).forget()
                    backend_of(model).reset_counters()
                    name = spec["name"] if placement is None else f"{spec['name']}-{placement}"
                    backend = backend_of(model)
                    run = partial(by_hand.run, backend)
                    arrays[name] = forced_logits(backend, run, spec["prompt"], spec["forced"])
                    counters = backend_of(model).device_counters()
                    result["device_counters"] = vars(counters)
                    result["counters"] = vars(backend_of(model).counters())
                    tier = backend_of(model).device
                    if tier is not None:
                        rows = tier.calls.residency(model.info.n_layer, model.info.n_expert)
                        # with those still on their way
                        result["n_resident"] = sum(len(row) - row.count(0) for row in rows)
                else:
                    mode = spec.get("mode", "exact")
                    options = {"temperature": 0, "max_tokens": spec["n"], "cache_prompt": False, "mode": mode}
                    reply, arrays[f"{spec['name']}-choices"] = answer(model, spec["prompt"], options)
                    result["answers"].append(
                        {"tokens": reply.tokens, "receipt": reply.receipt.to_dict(), "text": reply.text}
                    )
            result["stats"] = model.stats()
            result["peak"] = peak_resident_bytes()
            result["watched"] = watched(spec)
            return result
    except MobileError as error:
        return {"error": type(error).__name__, "message": str(error)}


def run_stock(spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import llama_cpp
    from llama_cpp import llama_cpp as lib

    lib.llama_backend_init()
    ggml = lib._lib
    ggml.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_register(ctypes.c_void_p(ggml.ggml_backend_rpc_add_server(spec["stock"].encode())))
    llama = llama_cpp.Llama(
        spec["model"],
        n_gpu_layers=-1,
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        use_mmap=False,
        verbose=False,
    )
    arrays[spec["name"]] = forced_logits(llama, llama.eval, spec["prompt"], spec["forced"])
    llama.close()
    return {}


def main() -> None:
    job = json.loads(sys.stdin.read())
    arrays: dict[str, np.ndarray] = {}
    results = {
        spec["name"]: (run_stock if "stock" in spec else run_ours)(spec, arrays) for spec in job["runs"]
    }
    with open(job["out"], "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
    # a build under test may not tear down cleanly at exit; what the job asked for is done by then
    os._exit(0)
