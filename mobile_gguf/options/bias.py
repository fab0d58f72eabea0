"""Biases on single tokens' logits, as they may be asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mobile_gguf.errors import UsageError

Bias = Mapping[Any, float] | Iterable[tuple[int, float]]
LIMIT = 100.0  # OpenAI's


def parse_bias(text: str) -> tuple[int, float]:
    """Read llama.cpp's form, ``TOKEN_ID+BIAS`` or ``TOKEN_ID-BIAS``. Raises UsageError."""
    digits = len(text) - len(text.lstrip("0123456789"))
    try:
        if digits and text[digits] in "+-":
            return int(text[:digits]), _checked(float(text[digits:]))
    except (ValueError, IndexError):
        pass
    raise UsageError(f"logit_bias is {text!r}: write a token id, + or -, and a number, such as 15043-100")


def format_bias(pair: tuple[int, float]) -> str:
    """The form that ``parse_bias`` reads."""
    token, bias = pair
    return f"{token}{float(bias):+}"


def read_bias(given: Bias | None, n_vocab: int) -> dict[int, float]:
    """Biases by token id, of a mapping (ids may be text, as in JSON) or of pairs. Raises UsageError."""
    pairs = given.items() if isinstance(given, Mapping) else given or ()
    biases: dict[int, float] = {}
    for key, bias in pairs:
        is_id = (isinstance(key, int) and not isinstance(key, bool)) or (
            isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
        )
        if not is_id:
            raise UsageError(f"logit_bias has {key!r}: its keys must be token ids")
        token = int(str(key))
        if not 0 <= token < n_vocab:
            raise UsageError(f"logit_bias has token {token}: the vocabulary has {n_vocab}")
        biases[token] = _checked(bias)
    return biases


def _checked(bias: Any) -> float:
    is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool) and math.isfinite(bias)
    if not is_number or abs(bias) > LIMIT:
        raise UsageError(f"logit_bias has the bias {bias!r}: it must be between -100 and 100")
    return float(bias)
