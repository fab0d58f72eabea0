"""How a token is chosen: a chain of llama.cpp's samplers, made for one answer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from llama_cpp import llama_cpp

# Tokens back that count as said, for the penalties.
_PENALTY_TOKENS = 64


class Sampler(contextlib.AbstractContextManager["Sampler"]):
    """The chain of a ``seed`` and of the settings of an answer; ``chain`` is its address.

    ``biases`` on single tokens' logits come before all else. Temperature 0 takes the likeliest token.
    """

    def __init__(
        self,
        n_vocab: int,
        seed: int,
        biases: Mapping[int, float] | None = None,
        *,
        temp: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
    ) -> None:
        self.chain: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if biases:
            array = (llama_cpp.llama_logit_bias * len(biases))(*biases.items())
            self._add(llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
        self._add(
            llama_cpp.llama_sampler_init_penalties(
                n_vocab, _PENALTY_TOKENS, repeat_penalty, frequency_penalty, presence_penalty
            )
        )
        if temp == 0.0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        self._add(llama_cpp.llama_sampler_init_top_k(top_k))
        self._add(llama_cpp.llama_sampler_init_typical(typical_p, 1))
        self._add(llama_cpp.llama_sampler_init_top_p(top_p, 1))
        self._add(llama_cpp.llama_sampler_init_min_p(min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(temp))
        self._add(llama_cpp.llama_sampler_init_dist(seed))

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self.chain, sampler)

    def copy(self) -> Sampler:
        """Another that would choose as this one does, and goes on by itself."""
        other = Sampler.__new__(Sampler)
        other.chain = llama_cpp.llama_sampler_clone(self.chain)
        return other

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the chain."""
        if self.chain:
            llama_cpp.llama_sampler_free(self.chain)
            self.chain = None
