"""Measuring what a prompt costs the processor: products with many tokens at once, and attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mobile_gguf.engine.devices import Device
from mobile_gguf.gguf.info import GgufInfo

from .ggml import Attention, Ggml, Matrices
from .machine import Rate
from .steps import PRODUCT_S, Step, main_products, matrices, mean_rate, mean_speed
from .workload import Heads, Product, Workload, read_heads

PROMPTS = "measuring prompts"  # the phase of these steps
_TOKENS = 512
_MIN_TOKENS = 32
_MULTIPLICATIONS = 2e9  # of one pass: a tenth of a second on a slow machine
_ATTENTION_TOKENS, _ATTENTION_POSITIONS = 128, 1024


def batch_name(product: Product, threads: int, *, n_expert: int = 1, k: int = 1, usual: bool = True) -> str:
    """What the multiplications per second of a product with many tokens at once are called."""
    where = "usual" if usual else "plain"
    return f"batch.{threads}.{where}.{product.type_id}.{product.n_in}x{product.n_out}.{k}of{n_expert}"


def attention_name(heads: Heads, threads: int, flash_attn: bool) -> str:
    """What the seconds of a layer's attention per token and position are called."""
    shape = f"{heads.n_head}x{heads.keys}+{heads.values}of{heads.n_head_kv}"
    return f"attention.{threads}.{'flash' if flash_attn else 'plain'}.{shape}"


def prompt_steps(
    info: GgufInfo,
    workload: Workload,
    threads: int,
    *,
    flash_attn: bool,
    resident: bool,
    stored: bool,
    cpu: Device,
    ggml: Ggml,
) -> Iterator[Step]:
    """The measurements that predicting prompts takes; ``resident``, ``stored``: as ``steps_for`` has them."""
    n, k = info.n_expert * info.segments, info.n_expert_used * info.segments
    wanted = [(product, 1, 1, True) for product in main_products(workload) if product.n_out != info.n_vocab]
    for product in workload.experts:
        wanted += [(product, n, k, usual) for usual in [False] * stored + [True] * resident]
    for product, n_expert, n_used, usual in wanted:
        name = batch_name(product, threads, n_expert=n_expert, k=n_used, usual=usual)
        what = _batch(product, n_expert, n_used, usual)

        def products(check: Callable[[], None], name: str = name, what: Matrices = what) -> dict[str, Rate]:
            with ggml.backend(cpu, threads) as backend:
                _, times = ggml.time_products(cpu, backend, what, PRODUCT_S, check)
            return {name: mean_speed(what.multiplications, times)}

        yield Step(name, PRODUCT_S, PROMPTS, products)
    heads = read_heads(info)
    if heads is None:
        return
    name = attention_name(heads, threads, flash_attn)
    layer = Attention(
        heads.n_head,
        heads.n_head_kv,
        heads.keys,
        heads.values,
        _ATTENTION_POSITIONS,
        _ATTENTION_TOKENS,
        flash_attn,
    )

    def attention(check: Callable[[], None]) -> dict[str, Rate]:
        with ggml.backend(cpu, threads) as backend:
            times = ggml.time_attention(backend, layer, PRODUCT_S, check)
        pairs = _ATTENTION_POSITIONS * _ATTENTION_TOKENS
        return {name: mean_rate([seconds / pairs for seconds in times])}

    yield Step(name, PRODUCT_S, PROMPTS, attention)


def _batch(product: Product, n_expert: int, k: int, usual: bool) -> Matrices:
    """As many tokens as a slow machine multiplies in a moment; of fewer, fewer experts, so that each has as
    many of them as in a prompt."""
    each = max(1, product.n_in * product.n_out * k)
    n_tokens = int(min(_TOKENS, max(_MIN_TOKENS, _MULTIPLICATIONS / each)))
    n_expert = max(k, n_expert * n_tokens // _TOKENS) if n_expert > 1 else 1
    return matrices(product, n_expert, k, usual, n_tokens=n_tokens)
