"""What a run makes the machine do: what a token reads and multiplies, from the tensor table, and with which
settings, from the options and what the file says of itself."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.generate.loss.price_list import read_prices
from mobile_gguf.generate.passes.decode import default_little_k
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.experts import expert_name
from mobile_gguf.gguf.facts import Facts
from mobile_gguf.gguf.header import TensorInfo, read_header
from mobile_gguf.gguf.info import GgufInfo, block_number
from mobile_gguf.memory.threads import default_threads
from mobile_gguf.options import DEFAULT_MAX_KLD, LoadOptions
from mobile_gguf.options.words import AUTO_MODE, BIG_LITTLE, DEFAULT_EVICTION, DEFAULT_IO_THREADS, EXACT

from .disk import SECTOR

_MAX_HOTNESS_BYTES = 1 << 24
_F32 = 0

# Of its budget mode auto spends so much: the rest is its margin.
SPENT_SHARE = 0.75
DEFAULT_BIG_SHARE = (0.2, 0.5, 0.9)  # low, expected, high: without calibration nobody knows


@dataclass(frozen=True)
class Product:
    """Matrices of one type and shape that a token is multiplied with: ``count`` of them, bytes of each, and
    whether they begin at a sector of the file."""

    type_id: int
    n_in: int
    n_out: int
    count: float
    n_bytes: int
    aligned: bool = False


@dataclass(frozen=True)
class Workload:
    """A token's work: dense products of the whole model, and the products of one expert in an average layer.

    ``experts``: an expert's matrices, ``count`` how many of that shape one layer's expert has; with segments,
    of one segment.
    """

    dense: tuple[Product, ...]
    experts: tuple[Product, ...]

    @property
    def dense_bytes(self) -> float:
        return sum(product.count * product.n_bytes for product in self.dense)

    @property
    def expert_bytes(self) -> float:
        return sum(product.count * product.n_bytes for product in self.experts)


@dataclass(frozen=True)
class Heads:
    """Attention of an average layer that attends, and how many do: heads, of numbers of keys and values."""

    n_layer: float
    n_head: int
    n_head_kv: int
    keys: int
    values: int


def read_heads(info: GgufInfo) -> Heads | None:
    """What a model attends with, by its header; None for one that only remembers."""
    facts = Facts(info.path, info.architecture, info.metadata)
    n_head = max(info.n_head, default=0)
    if not n_head:
        return None
    width = info.n_embd // n_head
    keys_length = facts.integer("attention.key_length", width)
    n_head_kv = max(facts.per_layer("attention.head_count_kv", 1, n_head), default=0) or n_head
    # of hybrids only some layers keep keys
    n_layer = min(info.n_layer, info.caches.attention.keys / max(1, n_head_kv * keys_length))
    if n_layer <= 0:
        return None
    return Heads(n_layer, n_head, n_head_kv, keys_length, facts.integer("attention.value_length", width))


def read_workload(info: GgufInfo) -> Workload:
    """The workload of a model whose header is good (GgufInfo was read from it)."""
    places = [
        (tensor, header.data_start + tensor.offset)
        for header in map(read_header, info.files)
        for tensor in header.tensors
        if block_number(tensor.name) < info.n_layer
    ]
    names = {tensor.name for tensor, _ in places}
    dense: Counter[tuple[int, int, int, int]] = Counter()
    experts: Counter[tuple[int, int, int, int]] = Counter()
    unaligned = set()
    for tensor, place in places:
        if len(tensor.shape) < 2 or keys.is_ours(tensor.name):
            continue
        name = expert_name(tensor.name)
        if name is None:
            if not _is_table(tensor.name, names):
                dense[_key(tensor, 1)] += 1
        else:
            stacked = name.number is None and len(tensor.shape) > 2
            key = _key(tensor, tensor.shape[-1] if stacked else 1)
            experts[key] += not name.number
            if place % SECTOR or (stacked and key[3] % SECTOR):
                unaligned.add(key)
    n_layer = max(1, info.n_layer_moe)
    return Workload(
        tuple(Product(*key[:3], count=n, n_bytes=key[3]) for key, n in sorted(dense.items())),
        tuple(
            Product(*key[:3], count=n / n_layer, n_bytes=key[3], aligned=key not in unaligned)
            for key, n in sorted(experts.items())
            if n
        ),
    )


def count_weights(info: GgufInfo) -> int:
    """Weights of the model, by its tensors' shapes."""
    n = 0
    for path in info.files:
        for tensor in read_header(path).tensors:
            if not keys.is_ours(tensor.name):
                n += math.prod(tensor.shape)
    return n


def _is_table(name: str, names: set[str]) -> bool:
    """Whether rows are only looked up: the embedding, unless it is the output matrix as well."""
    if name.startswith(("token_embd", "per_layer_token_embd", "position_embd")):
        return name != "token_embd.weight" or "output.weight" in names
    return "norm" in name or name.startswith("rope_")


def _key(tensor: TensorInfo, n_matrices: int) -> tuple[int, int, int, int]:
    n_in, n_out, *more = tensor.shape
    if n_matrices == 1:
        for n in more:
            n_out *= n
    return tensor.type_id, n_in, n_out, tensor.n_bytes // max(1, n_matrices)


@dataclass(frozen=True)
class Settings:
    """What a prediction is for. Shares are of all experts; ``big_share`` (low, expected, high) are the
    tokens of big-little that all experts are used for, ``by_head`` whether the head finds them."""

    mode: str = EXACT
    k: int = 0
    little_k: int = 0
    ram_share: float = 1.0
    threads: int = 1
    io_threads: int = DEFAULT_IO_THREADS
    eviction: str = DEFAULT_EVICTION
    n_tokens: int = 128
    n_ctx: int = 4096
    n_ubatch: int = 512
    threads_batch: int = 1
    flash_attn: bool = False
    big_share: tuple[float, float, float] = DEFAULT_BIG_SHARE
    by_head: bool = False
    missed: float = 1.0  # in mode auto, of what exact misses
    device: str = ""  # what its measurements are called; empty: none
    vram_share: float = 0.0
    miss: str = "auto"
    placement: str = "auto"


def make_settings(
    info: GgufInfo,
    options: LoadOptions,
    ram_share: float,
    *,
    n_ctx: int = 4096,
    n_ubatch: int = 512,
    n_tokens: int = 128,
    learnt_share: float | None = None,
    mode: str | None = None,
) -> Settings:
    """What a prediction for these options is for; ``learnt_share`` is what earlier runs had of big tokens."""
    k = info.n_expert_used
    by_head = keys.HEAD_THRESHOLD in info.metadata and options.importance != "confidence"
    own = info.metadata.get(keys.HEAD_LITTLE_K) if by_head else None
    little_k = options.little_k or (own if isinstance(own, int) and own > 0 else default_little_k(k))
    wanted = mode or options.mode
    return Settings(
        mode=wanted if info.is_moe and little_k < k else EXACT,
        k=k,
        little_k=min(little_k, k),
        ram_share=ram_share,
        threads=options.threads or default_threads()[0],
        io_threads=options.io_threads or DEFAULT_IO_THREADS,
        eviction=options.eviction,
        n_tokens=n_tokens,
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        threads_batch=options.threads_batch or options.threads or default_threads()[1],
        flash_attn=options.uses_flash_attention,
        big_share=big_share(info, options, by_head, learnt_share)
        if wanted == BIG_LITTLE
        else DEFAULT_BIG_SHARE,
        by_head=by_head,
        missed=missed_share(info, options, ram_share) if wanted == AUTO_MODE else 1.0,
    )


def missed_share(info: GgufInfo, options: LoadOptions, ram_share: float) -> float:
    """What mode auto misses of the bytes that exact does, by the file's prices; 1 where nothing is known."""
    prices = read_prices(info)
    max_kld = DEFAULT_MAX_KLD if options.max_kld is None else options.max_kld
    if prices is None or max_kld <= 0 or ram_share >= 1:
        return 1.0
    return prices.missed_at(ram_share, SPENT_SHARE * max_kld)


def big_share(
    info: GgufInfo, options: LoadOptions, by_head: bool, learnt: float | None
) -> tuple[float, float, float]:
    """(low, expected, high) share of big tokens: learnt, else calibrated, else a wide guess."""
    if learnt is not None:
        return _around(learnt, 0.15)
    if not by_head and options.gamma <= 0:
        return 0.0, 0.0, 0.0
    if not by_head and options.gamma > 1:
        return 1.0, 1.0, 1.0
    threshold = options.head_threshold
    if by_head and threshold is None:
        threshold = info.metadata.get(keys.HEAD_THRESHOLD)
    setting = threshold if by_head else options.gamma
    kind = "head" if by_head else "confidence"
    points = [
        (x, y)
        for point in _curve(info)
        if point.get("kind") == kind
        and (x := _number(point.get("value"))) is not None
        and (y := _number(point.get("big_share"))) is not None
    ]
    wanted = _number(setting)
    if not points or wanted is None:
        return DEFAULT_BIG_SHARE
    _, share = min(points, key=lambda point: abs(point[0] - wanted))
    return _around(min(1.0, max(0.0, share)), 0.25)


def _around(share: float, spread: float) -> tuple[float, float, float]:
    return max(0.0, share - spread), share, min(1.0, share + spread)


def _curve(info: GgufInfo) -> Sequence[dict[str, Any]]:
    text = info.metadata.get(keys.CALIBRATION_JSON)
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return ()
    if not isinstance(found, dict):
        return ()
    points = [found.get("default"), *(found.get("curves") or ())]
    return [point for point in points if isinstance(point, dict)]


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def read_hotness(info: GgufInfo) -> list[list[float]] | None:
    """The calibrated hotness, a row per layer; None if the file has none that is good."""
    for path in info.files:
        try:
            header = read_header(path)
        except MobileError:
            return None
        for tensor in header.tensors:
            if tensor.name == keys.HOTNESS:
                return _floats(path, header.data_start + tensor.offset, tensor.shape, tensor.type_id)
    return None


def _floats(path: Path, offset: int, shape: tuple[int, ...], type_id: int) -> list[list[float]] | None:
    if len(shape) != 2 or type_id != _F32 or 4 * shape[0] * shape[1] > _MAX_HOTNESS_BYTES:
        return None
    n_expert, n_layer = shape
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            flat = struct.unpack(f"<{n_expert * n_layer}f", stream.read(4 * n_expert * n_layer))
    except (OSError, struct.error):
        return None
    if not all(math.isfinite(value) and 0 <= value <= 1.001 for value in flat):
        return None
    return [list(flat[i * n_expert : (i + 1) * n_expert]) for i in range(n_layer)]
