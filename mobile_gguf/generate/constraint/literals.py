"""Numbers and values in a schema: which the library, and every reader of the answer, understand exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

# Beyond, a double is no longer every whole number, and readers of JSON disagree.
MAX_WHOLE = 2**53
_MAX_REAL = 1e15
_MIN_REAL = 1e-9


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number of JSON: finite, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def exact(value: float) -> float | None:
    """``value`` as the library takes it, a whole one as int; None where it may come out as another."""
    if value == 0:
        return 0
    if float(value).is_integer():
        return int(value) if abs(value) <= MAX_WHOLE else None
    return value if _MIN_REAL <= abs(value) <= _MAX_REAL else None


def whole(value: Any) -> int | None:
    """A count, 3.0 as well as 3; None for what is none."""
    if not is_number(value) or value < 0 or not float(value).is_integer():
        return None
    return int(value)


def odd_value(value: Any) -> str | None:
    """What in a value of an enum or a const cannot be written for sure; None if all can."""
    for part in _parts(value):
        if isinstance(part, bool) or part is None or isinstance(part, (dict, list)):
            continue
        if isinstance(part, str):
            if "\0" in part or any(0xD800 <= ord(char) <= 0xDFFF for char in part):
                return "text with U+0000 or half a surrogate pair"
        elif not is_number(part):
            return f"{part!r}, which is no value of JSON"
        elif exact(part) is None:
            return f"{part!r}, which readers of JSON do not agree about"
    return None


def _parts(value: Any) -> Iterator[Any]:
    pending = [value]
    while pending:
        part = pending.pop()
        yield part
        if isinstance(part, dict):
            pending += [*part, *part.values()]
        elif isinstance(part, list):
            pending += part


def plain(value: Any) -> Any:
    """A value with its numbers in the form of ``exact``: 1 for 1.0, and for -0.0 0."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if is_number(value):
        return exact(value)
    return value


def key(value: Any) -> Any:
    """What two equal values of JSON have in common: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, dict):
        return ("object", frozenset((name, key(part)) for name, part in value.items()))
    if isinstance(value, list):
        return ("array", tuple(key(part) for part in value))
    if isinstance(value, bool) or value is None:
        return (type(value).__name__, value)
    return ("number", value) if is_number(value) else ("text", value)
