"""Speed of a first prompt from a workload, measurements and settings: pure functions.

    a pass over the layers = max(computing, reading), and the first layer's reads, which nothing hides
    ... that does not need nearly all of a layer = reading, and what is not computed beside it

A pass is one micro-batch. Computing is multiplications over their measured rate, attention by positions and
tokens, and activations over the memory's bandwidth. Reading is what a pass needs of the experts, less what an
earlier one has left in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobile_gguf.gguf.caches import CONTEXT_MULTIPLE
from mobile_gguf.gguf.info import GgufInfo

from .machine import Measurements
from .measure_prompts import attention_name, batch_name
from .misses import distinct_share
from .predict import Case, Unknown
from .speed import BEFORE_LAST
from .workload import Heads, Settings, Workload, read_heads

LENGTHS = (512, 2048)
# What the model itself gets wrong, as a share of the time; docs/plan.md has the table.
_MODEL_ERROR = 0.15
# Needs of a layer from which on the next one is read ahead, as the engine has it.
_READ_AHEAD = 0.9
# Values that a token's activations are read and written as, beside products and attention: n_embd so many
# times (norms, residuals, queries and keys), of each expert n_ff and n_embd (gating, weighing, summing).
_PER_EMBD, _PER_FF, _PER_OUTPUT = 20, 3, 5
_F32 = 4


@dataclass(frozen=True)
class PromptPrediction:
    """Speed foreseen for a first prompt of ``n_tokens``, in tokens per second; the actual one is expected in
    [low, high]. ``first_token_s``: seconds until the answer begins."""

    n_tokens: int
    predicted_tps: float
    low: float
    high: float
    first_token_s: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return dataclasses.asdict(self)


def predict_prompts(
    info: GgufInfo,
    workload: Workload,
    measurements: Measurements,
    settings: Settings,
    disk: str,
    lengths: Sequence[int] = LENGTHS,
    n_different: int | None = None,
) -> tuple[PromptPrediction, ...]:
    """First prompts of those lengths that the context has room for, on the host; empty if too little was
    measured, and with a device. ``disk``: as ``disk_name`` says it; ``n_different``: tokens after which the
    prompt is the same again.
    """
    if settings.device:
        return ()
    found = []
    try:
        heads = read_heads(info)
        for n_tokens in sorted({min(n, settings.n_ctx) for n in lengths}):
            middle, fast, slow = (
                _Prompt(
                    Case(info, workload, measurements, settings, disk, None, which, 0), heads, n_different
                ).seconds(n_tokens)
                for which in ("value", "fast", "slow")
            )
            low = n_tokens / max(slow, middle) / (1 + _MODEL_ERROR)
            high = n_tokens / min(fast, middle) * (1 + _MODEL_ERROR)
            found.append(PromptPrediction(n_tokens, n_tokens / middle, low, high, middle))
    except Unknown:
        return ()
    return tuple(found)


@dataclass(frozen=True)
class _Prompt:
    """A prompt in one corner of the error band."""

    case: Case
    heads: Heads | None
    n_different: int | None = None

    def seconds(self, n_tokens: int) -> float:
        """Until all of it is computed."""
        step = max(1, self.case.settings.n_ubatch)
        starts = range(0, n_tokens, step)
        return sum(self.pass_seconds(start, min(step, n_tokens - start)) for start in starts)

    def pass_seconds(self, start: int, n_tokens: int) -> float:
        """One micro-batch, with ``start`` tokens before it."""
        computing = self.computing(start, n_tokens)
        info, settings = self.case.info, self.case.settings
        needed = distinct_share(info.n_expert, settings.k, min(n_tokens, self.n_different or n_tokens))
        # a first pass finds nothing in memory, the others what it has left
        missing = max(0.0, needed - (0.0 if start == 0 else settings.ram_share))
        if missing <= 0 or settings.ram_share >= 1 or not self.case.workload.experts:
            return computing
        reading = missing * self.case.all_reads_s()
        if needed >= _READ_AHEAD:
            first_layer = reading / max(1, info.n_layer_moe)
            return max(computing, reading - first_layer) + first_layer
        # what a layer has is computed while it reads the rest, up to its last matrix
        beside = computing * (1 - missing / needed) * BEFORE_LAST
        return max(reading, beside) + computing - beside

    def computing(self, start: int, n_tokens: int) -> float:
        """Of all layers, everything in memory."""
        case, info, settings = self.case, self.case.info, self.case.settings
        n, pieces = info.n_expert * info.segments, settings.k * info.segments
        token_s = 0.0
        for product in case.workload.dense:
            if product.n_out != info.n_vocab:  # logits are the last token's alone
                token_s += (
                    product.count
                    * product.n_in
                    * product.n_out
                    / self.rate(batch_name(product, self.threads))
                )
        for product in case.workload.experts:
            name = batch_name(product, self.threads, n_expert=n, k=pieces, usual=settings.ram_share >= 1)
            token_s += (
                info.n_layer_moe * product.count * pieces * product.n_in * product.n_out / self.rate(name)
            )
        token_s += self.activation_bytes() / case.any_rate(f"cpu.{settings.threads}.usual.")
        token_s += self.attention(start + n_tokens)
        overhead = case.spent("", f"overhead.{settings.threads}.", ".layer", 40e-6) * info.n_layer
        return overhead + n_tokens * token_s

    @property
    def threads(self) -> int:
        return self.case.settings.threads_batch

    def attention(self, n_positions: int) -> float:
        """Of one token, to as many positions as the context has cells in use, whole blocks of them."""
        if self.heads is None:
            return 0.0
        name = attention_name(self.heads, self.threads, self.case.settings.flash_attn)
        rate = self.case.measurements.get(name)
        if rate is None:
            raise Unknown
        cells = -(-n_positions // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        return self.heads.n_layer * cells * self.case.slowness(rate)

    def activation_bytes(self) -> float:
        info = self.case.info
        layer = _PER_EMBD * info.n_embd
        expert = _PER_FF * info.n_ff_expert + _PER_OUTPUT * info.n_embd
        return _F32 * (info.n_layer * layer + info.n_layer_moe * self.case.settings.k * expert)

    def rate(self, name: str) -> float:
        """Multiplications a second: as measured for the shape, else for others of the type, else for any."""
        exact = self.case.measurements.get(name)
        if exact is not None:
            return self.case.quickness(exact)
        batch, threads, where, kind, _ = name.split(".", 4)
        return self.case.any_rate(f"{batch}.{threads}.{where}.{kind}.", f"{batch}.{threads}.{where}.")
