"""The smallest model that follows a trace."""

from __future__ import annotations

from mobile_gguf.bench.geometry import ModelShape
from mobile_gguf.bench.synthetic import synthesise_trace
from mobile_gguf.bench.text import SPARE_TOKENS

TINY_TRACE = synthesise_trace(n_layer=2, n_expert=8, k=2, n_prompt=5, n_decode=9)
TINY = ModelShape(n_layer=2, n_expert=8, k=2, n_embd=512, n_ff=32, n_vocab=TINY_TRACE.n_steps + SPARE_TOKENS)
