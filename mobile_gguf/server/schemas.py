"""JSON schemas from clients: refused before they are made into a grammar that would never be done."""

from __future__ import annotations

from typing import Any

from .failures import ApiError

# llama.cpp's grammars refuse more repetitions than that; making their text would take gigabytes.
_MAX_REPEAT = 2000
_MAX_NODES = 5000
_MAX_DEPTH = 64
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength")


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Raise ApiError if ``schema`` is too deep or large, or repeats more than a grammar can."""
    n_nodes = 0
    pending: list[tuple[Any, int]] = [(schema, 0)]
    while pending:
        node, depth = pending.pop()
        n_nodes += 1
        if depth > _MAX_DEPTH or n_nodes > _MAX_NODES:
            raise ApiError(400, f"the JSON schema in {param} is too large", param=param, code="invalid_value")
        if isinstance(node, dict):
            for name in _REPEATS:
                number = node.get(name)
                if isinstance(number, (int, float)) and number > _MAX_REPEAT:
                    raise ApiError(
                        400,
                        f"{name} in {param} is {number}: at most {_MAX_REPEAT}",
                        param=param,
                        code="invalid_value",
                    )
            pending += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list):
            pending += [(value, depth + 1) for value in node]
