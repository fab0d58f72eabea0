"""From options and a file to the settings of a prediction: budgets as shares, experts of a little token, and
how many tokens of big-little will be big."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.generate.decode import default_little_k
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.header import read_header
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.threads import default_threads
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import BIG_LITTLE, DEFAULT_IO_THREADS, EXACT

from .predict import DEFAULT_BIG_SHARE, Settings

_MAX_HOTNESS_BYTES = 1 << 24
_F32 = 0


def make_settings(
    info: GgufInfo,
    options: LoadOptions,
    ram_share: float,
    *,
    n_ctx: int = 4096,
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
        big_share=big_share(info, options, by_head, learnt_share)
        if wanted == BIG_LITTLE
        else DEFAULT_BIG_SHARE,
        by_head=by_head,
    )


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
    import struct

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
