"""Whether no value satisfies two schemas at once: what makes ``oneOf`` the same as ``anyOf``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .literals import key

_MAX_DEPTH = 8
_TYPES = ("null", "boolean", "number", "string", "array", "object")


class Disjoint:
    """Proofs over schemas whose references ``resolve`` finds; not proven is no."""

    def __init__(self, resolve: Callable[[str], Any]) -> None:
        self._resolve = resolve

    def all_of(self, schemas: list[Any]) -> bool:
        """Whether no two of ``schemas`` have a value in common."""
        return all(self.two(one, other) for i, one in enumerate(schemas) for other in schemas[i + 1 :])

    def two(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Whether the two are proven to have no value in common."""
        if depth > _MAX_DEPTH:
            return False
        if one is False or other is False:
            return True
        ones, others = self._parts(one, 0), self._parts(other, 0)
        if self._apart(ones, others, depth):
            return True
        for part in ones:
            if (choices := part.get("anyOf") or part.get("oneOf")) and isinstance(choices, list):
                return all(self.two(choice, other, depth + 1) for choice in choices)
        for part in others:
            if (choices := part.get("anyOf") or part.get("oneOf")) and isinstance(choices, list):
                return all(self.two(one, choice, depth + 1) for choice in choices)
        return False

    def _parts(self, schema: Any, depth: int) -> list[dict[str, Any]]:
        """The schema and all that hold with it: what it refers to, and its allOf."""
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return []
        parts = [schema]
        if isinstance(reference := schema.get("$ref"), str):
            parts += self._parts(self._resolve(reference), depth + 1)
        if isinstance(schema.get("allOf"), list):
            for part in schema["allOf"]:
                parts += self._parts(part, depth + 1)
        return parts

    def _apart(self, ones: list[dict[str, Any]], others: list[dict[str, Any]], depth: int) -> bool:
        if not _types(ones) & _types(others):
            return True
        values, other_values = _values(ones), _values(others)
        if values is not None and other_values is not None and not values & other_values:
            return True
        if _types(ones) & _types(others) - {"object"}:
            return False
        shared = _required(ones) & _required(others)
        return any(
            self.two(mine, theirs, depth + 1)
            for name in sorted(shared)
            for mine in _property(ones, name)
            for theirs in _property(others, name)
        )


def _types(parts: list[dict[str, Any]]) -> set[str]:
    types: set[str] = set(_TYPES)
    for part in parts:
        if (given := part.get("type")) is not None:
            names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
            types &= {"number" if name == "integer" else name for name in names}
    if (values := _values(parts)) is not None:
        kinds = {"NoneType": "null", "bool": "boolean", "text": "string"}
        types &= {kinds.get(kind, kind) for kind, _ in values}
    return types


def _values(parts: list[dict[str, Any]]) -> set[Any] | None:
    """What enum and const leave; None where there is neither."""
    found: set[Any] | None = None
    for part in parts:
        given = [part["const"]] if "const" in part else part.get("enum")
        if isinstance(given, list):
            values = {key(value) for value in given}
            found = values if found is None else found & values
    return found


def _required(parts: list[dict[str, Any]]) -> set[str]:
    return {
        name
        for part in parts
        if isinstance(part.get("required"), list)
        for name in part["required"]
        if isinstance(name, str)
    }


def _property(parts: list[dict[str, Any]], name: str) -> list[Any]:
    return [
        part["properties"][name]
        for part in parts
        if isinstance(part.get("properties"), dict) and name in part["properties"]
    ]
