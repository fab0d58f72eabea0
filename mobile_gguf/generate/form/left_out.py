"""What of a tool's parameters llama.cpp's chat parser does not follow, without saying so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..constraint.limits import MAX_REPEAT

# Keywords that its json-schema-to-grammar.cpp does not read, and that say something.
_UNREAD = frozenset(
    {"multipleOf", "minProperties", "maxProperties", "patternProperties", "propertyNames", "not", "if"}
    | {"contains", "minContains", "maxContains", "uniqueItems", "additionalItems", "unevaluatedItems"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"}
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_FORMATS = ("date", "time", "date-time", "uuid")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
# What has schemas by names of its own, and what has values, which are no schemas.
_NAMED = ("properties", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples", "required")


def left_out(parameters: Any) -> list[str]:
    """The keywords that are not followed, each once, in alphabetical order."""
    return sorted({keyword for schema in _schemas(parameters) for keyword in _unread(schema)})


def _schemas(parameters: Any) -> Iterator[Mapping[str, Any]]:
    pending = [parameters]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, Mapping):
            yield part
            for name, value in part.items():
                if name in _NAMED and isinstance(value, Mapping):
                    pending += value.values()
                elif name not in _VALUES:
                    pending.append(value)


def without_large_counts(parameters: Any) -> Any:
    """The same without counts that a grammar has no room for."""
    if isinstance(parameters, list):
        return [without_large_counts(one) for one in parameters]
    if not isinstance(parameters, Mapping):
        return parameters
    made = {}
    for name, value in parameters.items():
        if name in _NAMED and isinstance(value, Mapping):
            made[name] = {key: without_large_counts(one) for key, one in value.items()}
        elif not _is_large(name, value):
            made[name] = value if name in _VALUES else without_large_counts(value)
    return made


def _is_large(keyword: str, value: Any) -> bool:
    return keyword in _COUNTS and isinstance(value, (int, float)) and value > MAX_REPEAT


def _unread(schema: Mapping[str, Any]) -> Iterator[str]:
    for keyword, value in schema.items():
        says_something = value not in (False, None, {}, [])
        if keyword in _UNREAD and says_something:
            yield keyword
        elif _is_large(keyword, value):
            yield f"{keyword} over {MAX_REPEAT:,}"
        elif keyword in _BOUNDS and schema.get("type") != "integer":
            yield f"{keyword} of a number"
        elif keyword == "format" and value not in _FORMATS:
            yield f"format {value}"
        elif keyword == "pattern" and not (str(value).startswith("^") and str(value).endswith("$")):
            yield "pattern without ^ and $"
