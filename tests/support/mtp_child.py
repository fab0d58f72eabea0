"""Drafts of llama.cpp's own MTP context, as its common/speculative.cpp makes them; for ``test_mtp``.

Run on the stock library ($LLAMA_CPP_LIB_PATH): arguments are a model, the file to write, tokens of a prompt
with commas between, and how many tokens to draft. Calls of llama-ext.h are C++, and named as such.
"""

from __future__ import annotations

import ctypes
import re
import sys
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

_SET = "_Z26llama_set_embeddings_nextnP13llama_contextbb"
_GET = "_Z30llama_get_embeddings_nextn_ithP13llama_contexti"
_STATES: Any = ctypes.POINTER(ctypes.c_float)


class Run:
    def __init__(self, path: str) -> None:
        library = llama_cpp._lib
        self.keep = getattr(library, _SET)
        self.keep.restype, self.keep.argtypes = None, [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool]
        self.read = getattr(library, _GET)
        self.read.restype, self.read.argtypes = _STATES, [ctypes.c_void_p, ctypes.c_int32]
        params = llama_cpp.llama_model_default_params()
        params.load_mtp, params.n_gpu_layers = True, 0
        params.use_extra_bufts = False
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.model: Any = llama_cpp.llama_model_load_from_file(path.encode(), params)
        assert self.model
        self.n_embd = llama_cpp.llama_model_n_embd_out(self.model)
        vocab: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def context(self, kind: int, other: Any = None) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.ctx_type = 512, 64, 64, kind
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if other is not None:
            params.ctx_other = other
        ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert ctx
        return ctx

    def decode(self, ctx: Any, tokens: list[int], start: int, states: np.ndarray | None = None) -> np.ndarray:
        """Run tokens, with a state each; returns the last one's logits."""
        n = len(tokens)
        numbers = np.zeros((4, n), np.int32)
        numbers[0], numbers[1], numbers[2] = tokens, np.arange(start, start + n), 1
        addresses = (numbers[3].ctypes.data + 4 * np.arange(n)).astype(np.uintp)
        outputs = np.zeros(n, np.int8)
        outputs[-1] = 1
        int32 = ctypes.POINTER(ctypes.c_int32)
        batch = llama_cpp.llama_batch(
            n_tokens=n,
            token=numbers[0].ctypes.data_as(int32),
            embd=None if states is None else states.ctypes.data_as(_STATES),
            pos=numbers[1].ctypes.data_as(int32),
            n_seq_id=numbers[2].ctypes.data_as(int32),
            seq_id=addresses.ctypes.data_as(ctypes.POINTER(int32)),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        assert llama_cpp.llama_decode(ctx, batch) == 0
        found = llama_cpp.llama_get_logits_ith(ctx, n - 1)
        return np.ctypeslib.as_array(found, shape=(self.n_vocab,)).copy()

    def state(self, ctx: Any, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.read(ctx, i), shape=(self.n_embd,)).copy()


def main(path: str, out: str, words: str, n: str) -> int:
    llama_cpp.llama_backend_init()
    logged: list[str] = []
    log = llama_cpp.llama_log_callback(lambda _level, text, _data: logged.append(text.decode()))
    llama_cpp.llama_log_set(log, ctypes.c_void_p())
    run, prompt = Run(path), [int(word) for word in words.split(",")]
    own = run.context(llama_cpp.LLAMA_CONTEXT_TYPE_DEFAULT)
    logged.clear()
    block = run.context(llama_cpp.LLAMA_CONTEXT_TYPE_MTP, own)
    kept = sum(map(float, re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(logged))))
    run.keep(own, True, False)
    run.keep(block, True, True)
    logits = [run.decode(own, prompt, 0)]
    states = np.stack([run.state(own, i) for i in range(len(prompt))])
    # each token with the state before it, the first one with none
    run.decode(block, prompt, 0, np.concatenate([np.zeros_like(states[:1]), states[:-1]]))
    state = states[-1]
    for i in range(int(n)):
        token = int(logits[-1].argmax())
        logits.append(run.decode(block, [token], len(prompt) + i, state[None].copy()))
        state = run.state(block, 0)
    np.savez(out, logits=np.stack(logits), kept=kept)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
