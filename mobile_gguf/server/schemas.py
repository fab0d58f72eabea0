"""JSON schemas from clients: what cannot be followed is refused, or left out of a tool's parameters."""

from __future__ import annotations

from typing import Any

from mobile_gguf.errors import UsageError
from mobile_gguf.generate.constraint.making import followable
from mobile_gguf.generate.constraint.schema import prepare

from .failures import ApiError


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Raise ApiError, which names ``param``, if an answer could not follow all of ``schema``."""
    try:
        prepare(schema)
    except UsageError as error:
        raise ApiError(400, str(error), param=param, code="invalid_value") from None


def call_schema(tools: list[tuple[str, dict[str, Any] | None]]) -> tuple[dict[str, Any], list[str]]:
    """JSON schema of a call of one of the tools, of their names and parameters, and notes.

    What cannot be followed in one tool's parameters is left free, with a note: it costs no other tool.
    """
    notes: list[str] = []
    parameters = []
    for name, given in tools:
        schema, left_out = _arguments(given)
        notes += [f"tool {name}: {reason}" for reason in left_out]
        parameters.append(schema)
    names = [name for name, _ in tools]
    made, left_out = followable(_calls(names, parameters))
    if left_out:  # each alone can be followed, all together are too large
        notes += [f"tools: {reason}" for reason in left_out]
        made = _calls(names, [{"type": "object"}] * len(tools))
    return made, notes


def _arguments(given: dict[str, Any] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    if not given:
        return {"type": "object"}, ()
    if given.get("type", "object") != "object":
        return {"type": "object"}, ("its parameters are no object",)
    return followable({"type": "object", **given})


def _calls(names: list[str], parameters: list[dict[str, Any]]) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    calls = []
    for i, (name, schema) in enumerate(zip(names, parameters, strict=True)):
        own_id = str(schema.get("$id", "")).rstrip("#")
        definition = {key: value for key, value in schema.items() if key != "$id"}
        definitions[f"tool{i}"] = _moved(definition, f"#/$defs/tool{i}", own_id)
        arguments = {"$ref": f"#/$defs/tool{i}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions}


# What has names of a schema's own below it, and what has values, which are no schemas.
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
_VALUES = {"const", "enum", "default", "examples"}


def _moved(schema: Any, root: str, own_id: str) -> Any:
    """A schema whose references to itself, also by its ``own_id``, lead to ``root``."""
    if isinstance(schema, list):
        return [_moved(item, root, own_id) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for name, value in schema.items():
        if name in _VALUES:
            made[name] = value
        elif name in _NAMED and isinstance(value, dict):
            made[name] = {key: _moved(inner, root, own_id) for key, inner in value.items()}
        elif name == "$ref" and isinstance(value, str):
            reference = value.removeprefix(own_id) or "#"
            made[name] = root + reference[1:] if reference == "#" or reference.startswith("#/") else reference
        else:
            made[name] = _moved(value, root, own_id)
    return made
