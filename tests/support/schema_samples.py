# ruff: noqa: E501  (a table)
"""JSON schemas that are followed: a list by keyword, and a generator that joins keywords at random."""

from __future__ import annotations

import random
from typing import Any

_NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
}
_CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "maximum": 9}},
}
_DOG = {
    "type": "object",
    "properties": {"kind": {"const": "dog"}, "name": {"type": "string", "maxLength": 5}},
}

SCHEMAS: list[Any] = [
    # any value, types
    {}, True, {"title": "X"}, {"type": "null"}, {"type": "boolean"}, {"type": ["integer", "string"], "maxLength": 2},
    # numbers
    {"type": "integer"}, {"type": "number"}, {"type": "integer", "minimum": 0, "maximum": 9},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"type": "integer", "exclusiveMinimum": 0.5},
    {"type": "number", "minimum": 1.5, "maximum": 1.75}, {"type": "number", "exclusiveMaximum": -0.0, "minimum": -2},
    {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, {"type": "integer", "multipleOf": 7},
    {"type": "number", "multipleOf": 0.25, "maximum": 100}, {"minimum": 5}, {"maximum": -3.5},
    {"type": "integer", "minimum": -(2**53), "maximum": -(2**52)},
    # texts
    {"type": "string", "minLength": 2, "maxLength": 4}, {"type": "string", "maxLength": 100_000},
    {"type": "string", "pattern": r"^\d{3}-\w+\s$"}, {"type": "string", "pattern": "^(?:ab)+$", "maxLength": 5},
    {"type": "string", "pattern": r"\d"}, {"type": "string", "pattern": "^a|b$"},
    {"type": "string", "pattern": r"^[^\d\s]{1,5}$"}, {"type": "string", "pattern": "^[\\x00-\\x1f]{1,3}$"},
    {"type": "string", "pattern": '^[^"]{1,6}$'}, {"type": "string", "pattern": r"^[^\\]{1,6}$"},
    {"type": "string", "pattern": '^[^\\n"]{1,6}$'}, {"type": "string", "pattern": r"^.{1,2500}$", "maxLength": 9},
    {"type": "string", "pattern": r"^[[&&b]{2}$"}, {"type": "string", "pattern": "^\U0001f600\"\\\\\n/$"},
    {"type": "string", "pattern": "^([\\x00-\\x0f]|[\\x10-\\x1f]){2}$"}, {"type": "string", "pattern": r"^\W\D\S$"},
    {"type": "string", "pattern": r"^\x41B\t\u0043\-\/$"}, {"type": "string", "pattern": ""},
    {"type": "string", "pattern": "^(?:[0-9]{4})-A$"},
    {"type": "string", "pattern": "^[a-z]{2,4}?$", "minLength": 3}, {"pattern": "^x$", "maxLength": 1},
    *({"type": "string", "format": name} for name in (
        "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
    )),
    # enum, const
    {"enum": [1, "a", None, True, [1, 2], {"a": 1}]}, {"const": {"a": [1, {"b": None}]}}, {"enum": [1.0, -0.0, 0.1]},
    {"type": ["string", "null"], "enum": ["x", None, 3]}, {"type": "integer", "enum": [1, 1.5, "x"]},
    # arrays
    {"type": "array", "items": {"type": "integer", "maximum": 1, "minimum": 0}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False}, {"type": "array", "items": False},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}}, {"type": "array", "maxItems": 10**9},
    {"type": "array", "minItems": 60, "items": {"type": "null"}}, {"uniqueItems": True, "maxItems": 1},
    # objects
    {"type": "object"}, {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a", "b"]}, {"required": ["a"]},
    {"properties": {"a": {"type": "integer"}}}, {"type": "object", "properties": {"a": {"title": "Any"}}},
    {"type": "object", "properties": {"a": True, "b": False, "c": {"const": 1}}, "required": ["c"]},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}, "^y": {}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^[!-~]+$": {"type": "integer"}}, "additionalProperties": {"const": 1}},
    {"type": "object", "maxProperties": 2}, {"type": "object", "minProperties": 1}, {"type": "object", "maxProperties": 0},
    {"type": "object", "required": ["a", "b"], "minProperties": 2, "properties": {"a": True, "b": True}},
    {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(40)}},
    # references
    {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 3, "maximum": 5},
    {"$defs": {"Node": _NODE}, "$ref": "#/$defs/Node"}, {"definitions": {"n": _CAT}, "$ref": "#/definitions/n"},
    {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"$ref": "#/properties/a"}}, "required": ["b"]},
    {"$ref": "#foo", "$defs": {"a": {"$anchor": "foo", "const": 1}}}, {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"const": 1}}},
    # together
    {"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"oneOf": [{"const": 1}, {"const": 2}, {"type": "null"}]},
    {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
     "$defs": {"Cat": {**_CAT, "required": ["kind"]}, "Dog": {**_DOG, "required": ["kind"]}}},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]}, {"anyOf": [{"minLength": 3}, {"type": "null"}], "maxLength": 4},
    {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
     "properties": {"a": {"const": 1}, "b": {"const": 1}}, "additionalProperties": False},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
               {"properties": {"a": {"minimum": 5, "maximum": 9}}}]},
]  # fmt: skip


def random_schema(chance: random.Random, depth: int = 0) -> Any:
    """A schema of the keywords that are followed, many of which nothing satisfies."""
    made: dict[str, Any] = {}
    kinds = chance.sample(_PARTS, chance.randint(1, 2))
    if chance.random() < 0.7:
        made["type"] = chance.choice(["integer", "number", "string", "array", "object", "object", "boolean"])
    for kind in kinds:
        made |= kind(chance, depth)
    return made


def _number(chance: random.Random) -> Any:
    return chance.choice([0, 1, -1, 7, 100, -0.5, 0.25, 2.5, 10**6, round(chance.uniform(-50, 50), 2)])


def _numbers(chance: random.Random, _depth: int) -> Any:
    low, high = sorted([_number(chance), _number(chance)])
    made = {"minimum": low, "maximum": high, "multipleOf": chance.choice([1, 2, 3, 0.5])}
    made |= {"exclusiveMinimum": low, "exclusiveMaximum": high}
    return {name: made[name] for name in chance.sample(sorted(made), chance.randint(1, 2))}


def _texts(chance: random.Random, _depth: int) -> Any:
    made: dict[str, Any] = {"minLength": chance.randint(0, 3), "maxLength": chance.randint(3, 8)}
    made["pattern"] = chance.choice(["^[a-c]+$", "b", r"^\S*$", '^[^"x]*$', "^(?:a|bc){1,3}$", r"^\w+\.?$"])
    return {name: made[name] for name in chance.sample(sorted(made), chance.randint(1, 3))}


def _objects(chance: random.Random, depth: int) -> Any:
    names = chance.sample(["a", "b", 'q"', "é"], chance.randint(1, 3))
    made: dict[str, Any] = {"properties": {name: _inner(chance, depth) for name in names}}
    made["required"] = chance.sample([*names, "z"], chance.randint(0, 2))
    if chance.random() < 0.5:
        made["additionalProperties"] = chance.choice([False, {"type": "null"}, True])
    return made


def _arrays(chance: random.Random, depth: int) -> Any:
    made: dict[str, Any] = {"items": _inner(chance, depth), "maxItems": chance.randint(1, 3)}
    if chance.random() < 0.4:
        made["prefixItems"] = [_inner(chance, depth)]
    return made | ({"minItems": 1} if chance.random() < 0.4 else {})


def _choices(chance: random.Random, depth: int) -> Any:
    name = chance.choice(["anyOf", "allOf", "oneOf"])
    return {name: [_inner(chance, depth) for _ in range(chance.randint(1, 3))]}


def _values(chance: random.Random, _depth: int) -> Any:
    return {"enum": chance.sample([1, 2.5, "a", "b", None, True, [], {}, [1]], chance.randint(1, 4))}


def _inner(chance: random.Random, depth: int) -> Any:
    return {"type": "null"} if depth > 2 else random_schema(chance, depth + 1)


_PARTS = [_numbers, _texts, _objects, _arrays, _choices, _values]
