"""Biases on single tokens' logits, as they may be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mobile_gguf.errors import UsageError, shown

LIMIT = 100.0  # OpenAI's
_MAX_TOKEN = 10**9


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


def take_bias(given: Any) -> dict[int, float]:
    """Biases by token id, of a mapping (ids may be text, as in JSON) or of pairs. Raises UsageError."""
    if not isinstance(given, (Mapping, list, tuple)):
        raise UsageError(f"{shown(given)} has no token ids and biases")
    biases: dict[int, float] = {}
    for pair in given.items() if isinstance(given, Mapping) else given:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            raise UsageError(f"{shown(pair)} is no pair of a token id and a bias")
        biases[_token(pair[0])] = _checked(pair[1])
    return biases


def check_tokens(tokens: Iterable[int], n_vocab: int, where: str = "") -> None:
    """Raise UsageError for a token that is not in the vocabulary; ``where`` they stand, to say it."""
    for token in tokens:
        if not 0 <= token < n_vocab:
            raise UsageError(
                f"{where}{': ' if where else ''}token {token} is not in the vocabulary of {n_vocab}"
            )


def _token(key: Any) -> int:
    is_id = (isinstance(key, int) and not isinstance(key, bool) and 0 <= key < _MAX_TOKEN) or (
        isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
    )
    if not is_id:
        raise UsageError(f"it has {shown(key)}: its keys must be token ids")
    return int(key)


def _checked(bias: Any) -> float:
    is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
    if not is_number or not abs(bias) <= LIMIT:  # nor NaN
        raise UsageError(f"the bias is {shown(bias)}: it must be between -100 and 100")
    return float(bias)
