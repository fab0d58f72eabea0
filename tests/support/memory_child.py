"""What llama.cpp allocates for contexts: loads models, makes contexts, and reads the sizes that it logs.

stdin: {"models": {name: path}, "contexts": [[n_ctx, n_ubatch, flash_attn], ...]}, each with ggml's types of
keys and values behind, if they are not f16; "no_alloc": true where
nothing shall be allocated but be said all the same. stdout: by model a list of
{"caches": MiB, "n": buffers of caches, "compute": MiB} in the order of the contexts, or the end of the log,
or how its process died: each model has its own. The library is the one in $LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from functools import partial
from typing import Any

import llama_cpp.llama_cpp as lib
from forks import in_forks

_SIZE = re.compile(r"(KV|RS|state|compute) buffer size =\s*([\d.]+) MiB")
_UNALLOCATED = re.compile(r"llama_kv_cache: size =\s*([\d.]+) MiB")  # its buffer is logged as nothing
WORKERS = 2
lines: list[str] = []


@lib.llama_log_callback
def keep_log(level: int, text: bytes, user_data: Any) -> None:
    lines.append(text.decode(errors="replace"))


def sizes(
    model: Any,
    no_alloc: bool,
    n_ctx: int,
    n_ubatch: int,
    flash_attn: bool,
    type_k: int = lib.GGML_TYPE_F16,
    type_v: int = lib.GGML_TYPE_F16,
) -> dict[str, Any]:
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = n_ctx, n_ubatch, n_ubatch, 1
    kinds = (lib.LLAMA_FLASH_ATTN_TYPE_DISABLED, lib.LLAMA_FLASH_ATTN_TYPE_ENABLED)
    params.flash_attn_type = kinds[flash_attn]
    params.type_k, params.type_v = type_k, type_v
    lines.clear()
    context = lib.llama_init_from_model(model, params)
    assert context, "".join(lines)[-2000:]
    lib.llama_free(context)
    found = [(kind, float(size)) for kind, size in _SIZE.findall("".join(lines))]
    if no_alloc:
        found = [one for one in found if one[0] != "KV"]
        found += [("KV", float(size)) for size in _UNALLOCATED.findall("".join(lines))]
    caches = [size for kind, size in found if kind != "compute"]
    return {
        "caches": sum(caches),
        "n": len(caches),
        "compute": sum(size for kind, size in found if kind == "compute"),
    }


def allocated(path: str, contexts: list[list[Any]], no_alloc: bool) -> list[dict[str, Any]] | str:
    lib.llama_log_set(keep_log, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    if no_alloc:
        params.no_alloc, params.load_mode = True, lib.LLAMA_LOAD_MODE_NONE
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        return "".join(lines)[-2000:]
    answer = [sizes(model, no_alloc, *context) for context in contexts]
    lib.llama_model_free(model)
    return answer


def main() -> None:
    job = json.load(sys.stdin)
    contexts, no_alloc = job["contexts"], bool(job.get("no_alloc"))
    tasks = {name: partial(allocated, path, contexts, no_alloc) for name, path in job["models"].items()}
    print(json.dumps(in_forks(tasks, workers=WORKERS)))


if __name__ == "__main__":
    main()
