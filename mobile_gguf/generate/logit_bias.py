"""Biases on single tokens' logits: llama.cpp's sampler that adds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def biased(sampler: Any, biases: Mapping[int, float], n_vocab: int) -> Any:
    """llama-cpp-python's sampler with the biases added before all that it does; ``sampler`` is used up."""
    from llama_cpp import _internals, llama_cpp

    made = _internals.LlamaSampler()
    array = (llama_cpp.llama_logit_bias * len(biases))(*biases.items())
    llama_cpp.llama_sampler_chain_add(
        made.sampler, llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), array)
    )
    for _ in range(llama_cpp.llama_sampler_chain_n(sampler.sampler)):
        llama_cpp.llama_sampler_chain_add(
            made.sampler, llama_cpp.llama_sampler_chain_remove(sampler.sampler, 0)
        )
    sampler.close()
    return made
