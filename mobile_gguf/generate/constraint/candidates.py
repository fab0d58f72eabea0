"""Sampling among the tokens that a constraint allows, and no others."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

from mobile_gguf.errors import GrammarError

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def sample_among(chain: Any, logits: np.ndarray, allowed: np.ndarray) -> int:
    """Have llama.cpp's sampler ``chain`` choose among ``allowed`` ids by ``logits`` [n_vocab], and note it.

    As llama_sampler_sample does, with fewer candidates: what is not allowed does not compete in top-k, top-p
    or any other sampler, as if its logit were -inf before them.
    """
    candidates = np.zeros(len(allowed), _CANDIDATE)
    candidates["id"] = allowed
    candidates["logit"] = logits[allowed]
    array = llama_cpp.llama_token_data_array(
        data=ctypes.cast(candidates.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data)),
        size=len(candidates),
        selected=-1,
        sorted=False,
    )
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))  # pyright: ignore[reportArgumentType]
    if not 0 <= array.selected < array.size:
        raise GrammarError("the sampling settings leave none of the tokens that the grammar allows")
    token = int(array.data[array.selected].id)
    llama_cpp.llama_sampler_accept(chain, token)
    return token
