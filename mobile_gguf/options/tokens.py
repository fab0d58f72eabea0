"""Numbers that may be left to the machine: ``512`` tokens or ``4`` answers, or ``auto``."""

from __future__ import annotations

import numbers
from typing import Any, Final, Literal

from mobile_gguf.errors import UsageError, shown

from .words import AUTO, OFF, ON

MAX_TOKENS = 1 << 24
MAX_PARALLEL = 64
_AUTO: Final = "auto"
_SWITCH: dict[str, bool | Literal["auto"]] = {ON: True, OFF: False, AUTO: AUTO}


def parse_switch(value: Any) -> bool | Literal["auto"]:
    """Read ``on``, ``off`` or ``auto``; True and False are the first two. Raises UsageError."""
    if isinstance(value, bool):
        return value
    found = _SWITCH.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise UsageError(f"{shown(value)} is neither True, False nor auto: write on, off or {AUTO}")
    return found


def parse_tokens_or_auto(value: Any) -> int | Literal["auto"]:
    """Read a number of tokens, or ``auto``, which comes back as it is. Raises UsageError."""
    return _number_or_auto(value, MAX_TOKENS, "tokens")


def parse_parallel(value: Any) -> int | Literal["auto"]:
    """Read how many answers are made at once, or ``auto``, which comes back as it is. Raises UsageError."""
    return _number_or_auto(value, MAX_PARALLEL, "answers")


def _number_or_auto(value: Any, most: int, what: str) -> int | Literal["auto"]:
    if isinstance(value, str):
        text = value.strip().lower()
        if text == _AUTO:
            return _AUTO
        # neither signs nor the digits of other scripts, which int() takes as well
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
    else:
        number = 0
    if not 1 <= number <= most:
        raise UsageError(f"{shown(value)} is not a number of {what}: write 1 to {most}, or {_AUTO}")
    return number
