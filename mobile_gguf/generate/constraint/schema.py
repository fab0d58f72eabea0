"""A JSON schema as the constraint library may have it: bounded, without what it would half follow.

All that is left of a schema is what constrains an answer, in a form that the library follows to the letter;
what cannot be followed is refused by keyword and place. ``loosened`` leaves it out instead, which only ever
allows more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mobile_gguf.errors import UsageError, shown

from .disjoint import Disjoint
from .keywords import ENFORCED, FORMATS, REFUSED, REFUSED_FORMATS, TYPES
from .limits import MAX_CHAIN, MAX_ENUM, MAX_REPEAT, MAX_WIDTH
from .literals import MAX_WHOLE, exact, is_number, key, odd_value, plain, whole
from .pattern import PatternError, translate
from .reading import check_size
from .references import References

_MAX_TOTAL_DEPTH = 2_000
_MAX_MULTIPLE = 1_000
_MAX_ONE_OF = 200
# RFC 3339 without leap seconds and small letters, which few readers take
_TIME = "[0-9]{2}:[0-9]{2}:[0-5][0-9](?:[.][0-9]{1,9})?(?:Z|[+-][0-9:]+)$"
_FORMAT_PATTERNS = {"time": "^" + _TIME, "date-time": "^[0-9-]+T" + _TIME}


def prepare(schema: Any) -> dict[str, Any]:
    """What of ``schema`` answers are to follow. Raises UsageError, with keyword and place."""
    check_size(schema)
    return _Preparation(schema, loose=False).run()


def loosened(schema: Any) -> tuple[Any, tuple[str, ...]]:
    """``schema`` without what ``prepare`` refuses, and a note for each keyword that is left out.

    Raises UsageError for what cannot be helped so: its size, or what is no schema.
    """
    check_size(schema)
    preparation = _Preparation(schema, loose=True)
    preparation.run()
    notes = tuple(dict.fromkeys(preparation.notes))
    return (_without(schema, preparation.dropped) if notes else schema), notes


def _without(part: Any, dropped: set[tuple[int, str]]) -> Any:
    if isinstance(part, dict):
        return {
            name: _without(value, dropped) for name, value in part.items() if (id(part), name) not in dropped
        }
    return [_without(one, dropped) for one in part] if isinstance(part, list) else part


@dataclass
class _Spot:
    """A schema that is being read: where it is, and what is made of it."""

    schema: dict[str, Any]
    at: str
    depth: int
    shared: bool  # whether another schema holds for the same value
    made: dict[str, Any] = field(default_factory=dict)
    also: list[Any] = field(default_factory=list)  # what holds besides, for allOf


class _Preparation:
    def __init__(self, root: Any, loose: bool) -> None:
        self._root = root
        self._loose = loose
        self.notes: list[str] = []
        self.dropped: set[tuple[int, str]] = set()  # by the identity of the schema that has the keyword
        self._references = References(root)
        self._disjoint = Disjoint(self._found)
        self._names: dict[tuple[int, bool], str] = {}
        self._pending: list[tuple[str, str, Any, bool]] = []
        self._depth = self._total_depth = 0

    def run(self) -> dict[str, Any]:
        made = self._place(self._root, "#")
        definitions: dict[str, Any] = {}
        while self._pending:
            name, at, target, shared = self._pending.pop()
            definitions[name] = self._place(target, at, shared)
        if made is False:
            raise UsageError("the JSON schema is false: nothing satisfies it")
        made = {} if made is True else made
        return {"$defs": definitions, **made} if definitions else made

    def _place(self, schema: Any, at: str, shared: bool = False) -> Any:
        """A schema that others lie in; the depths of all of them bound how deep the library recurses."""
        self._depth = 0
        made = self._schema(schema, at, 0, shared)
        self._total_depth += self._depth + 1
        if self._total_depth > _MAX_TOTAL_DEPTH:
            raise UsageError("the JSON schema has too many schemas within schemas")
        return made

    def _found(self, reference: str) -> Any:
        try:
            return self._references.find(reference)
        except KeyError:
            return None

    def _refuse(self, spot: _Spot, name: str, why: str) -> None:
        """Say that keyword ``name`` is not followed."""
        text = f"{name} at {spot.at} {why}"
        if not self._loose:
            raise UsageError(f"the JSON schema cannot be followed: {text}")
        self.notes.append(text)
        self.dropped.add((id(spot.schema), name))
        if name == "patternProperties":  # names that it would have allowed must not be forbidden
            self.dropped.add((id(spot.schema), "additionalProperties"))

    def _schema(self, schema: Any, at: str, depth: int, shared: bool = False) -> Any:
        self._depth = max(self._depth, depth)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise UsageError(f"the JSON schema cannot be followed: {shown(schema)} at {at} is no schema")
        spot = _Spot(schema, at, depth, shared)
        for name, value in schema.items():
            if name in REFUSED:
                self._check_refused(spot, name, value)
            elif name in ENFORCED:
                self._reader(name)(spot, name, value)
        if also := [one for one in spot.also if one is not True and one != {}]:
            spot.made["allOf"] = also
        _close(spot)
        return spot.made

    def _reader(self, name: str) -> Callable[[_Spot, str, Any], None]:
        return getattr(self, "_read_" + _READERS.get(name, name).removeprefix("$"))

    def _each(self, spot: _Spot, name: str, schemas: list[Any], shared: bool = False) -> list[Any]:
        places = (f"{spot.at}/{name}/{i}" for i in range(len(schemas)))
        return [
            self._schema(one, at, spot.depth + 1, shared) for one, at in zip(schemas, places, strict=True)
        ]

    # keywords that no grammar here can follow

    def _check_refused(self, spot: _Spot, name: str, value: Any) -> None:
        schema = spot.schema
        without_effect = (
            (name == "uniqueItems" and (value is False or whole(schema.get("maxItems")) in (0, 1)))
            or (name in ("then", "else") and "if" not in schema)
            or (name == "if" and "then" not in schema and "else" not in schema)
            or (name in ("minContains", "maxContains") and ("contains" not in schema or value == 0))
            or (name == "contains" and schema.get("minContains") == 0 and "maxContains" not in schema)
            or (name == "not" and value is False)
            or (name == "propertyNames" and value in (True, {}, {"type": "string"}))
            or (name in ("unevaluatedItems", "unevaluatedProperties") and value in (True, {}))
            or (name.startswith("depend") and value == {})
        )
        if not without_effect:
            self._refuse(spot, name, "is not supported")

    # any value

    def _read_type(self, spot: _Spot, name: str, value: Any) -> None:
        types = [value] if isinstance(value, str) else value
        if not isinstance(types, list) or not types or not all(_text(one) and one in TYPES for one in types):
            why = f"is {shown(value)}: one of {', '.join(TYPES)}, or a list of them"
            return self._refuse(spot, "type", why)
        spot.made["type"] = value if isinstance(value, str) else list(dict.fromkeys(types))
        return None

    def _read_enum(self, spot: _Spot, name: str, value: Any) -> None:
        if not isinstance(value, list) or not value:
            return self._refuse(spot, "enum", "is no list of values")
        if len(value) > MAX_ENUM:
            return self._refuse(spot, "enum", f"has {len(value):,} values: at most {MAX_ENUM:,}")
        if odd := odd_value(value):
            return self._refuse(spot, "enum", f"has {odd}")
        spot.made["enum"] = plain(list({key(one): one for one in value}.values()))
        return None

    def _read_const(self, spot: _Spot, name: str, value: Any) -> None:
        if odd := odd_value(value):
            return self._refuse(spot, "const", f"has {odd}")
        spot.also.append({"enum": [plain(value)]})
        return None

    def _read_ref(self, spot: _Spot, name: str, value: Any) -> None:
        if self._references.has_inner_ids:
            return self._refuse(spot, "$ref", "is not supported beside an $id within the schema")
        try:
            target = self._references.find(value)
        except (KeyError, AttributeError, TypeError):
            return self._refuse(spot, "$ref", f"leads to {shown(value)}, which is not in the schema")
        if isinstance(target, bool):
            spot.also.append(target)
            return None
        known = id(target), spot.shared or bool(_JOINT & spot.schema.keys() - {name})
        if known not in self._names:
            if len(self._names) >= MAX_CHAIN:
                raise UsageError(f"the JSON schema has references to more than {MAX_CHAIN} places")
            self._names[known] = f"r{len(self._names)}"
            self._pending.append((self._names[known], value, target, known[1]))
        spot.made["$ref"] = f"#/$defs/{self._names[known]}"
        return None

    def _read_choices(self, spot: _Spot, name: str, value: Any) -> None:
        if not isinstance(value, list) or not value:
            return self._refuse(spot, name, "is no list of schemas")
        if len(value) > MAX_WIDTH:
            return self._refuse(spot, name, f"has {len(value):,} schemas: at most {MAX_WIDTH:,}")
        shared = spot.shared or bool(_JOINT & spot.schema.keys() - {name})
        choices = self._each(spot, name, value, shared or (name == "allOf" and len(value) > 1))
        if name == "allOf":
            spot.also += choices
        elif name == "anyOf":
            spot.also.append({"anyOf": choices})
        elif len(choices) == 1:
            spot.also += choices
        elif len(choices) <= _MAX_ONE_OF and self._disjoint.all_of(value):
            spot.also.append({"anyOf": choices})
        else:
            return self._refuse(spot, "oneOf", "has schemas that may hold at once: write anyOf")
        return None

    # objects

    def _read_properties(self, spot: _Spot, name: str, value: Any) -> None:
        if not isinstance(value, dict):
            return self._refuse(spot, "properties", "is no object")
        if len(value) > MAX_WIDTH:
            return self._refuse(spot, "properties", f"has {len(value):,} names: at most {MAX_WIDTH:,}")
        kept = {}
        for prop, inner in value.items():
            if odd := odd_value(prop):
                self._refuse(spot, name, f"has {odd} among its names")
            else:
                kept[prop] = self._schema(inner, f"{spot.at}/{name}/{_escaped(prop)}", spot.depth + 1)
        spot.made["properties"] = kept
        return None

    def _read_required(self, spot: _Spot, name: str, value: Any) -> None:
        if not isinstance(value, list) or not all(map(_text, value)) or len(value) > MAX_WIDTH:
            return self._refuse(spot, "required", f"is no list of at most {MAX_WIDTH:,} names")
        if odd := odd_value(value):
            return self._refuse(spot, "required", f"has {odd}")
        spot.made["required"] = list(dict.fromkeys(value))
        return None

    def _read_additionalProperties(self, spot: _Spot, name: str, value: Any) -> None:
        spot.made[name] = self._schema(value, f"{spot.at}/{name}", spot.depth + 1)

    def _read_patternProperties(self, spot: _Spot, name: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) > 50:
            return self._refuse(spot, name, "is no object of at most 50 patterns")
        patterns = {}
        for pattern, inner in value.items():
            place = f"{spot.at}/{name}/{_escaped(pattern)}"
            try:
                patterns[translate(pattern)] = self._schema(inner, place, spot.depth + 1)
            except PatternError as error:
                return self._refuse(spot, name, f"cannot be followed: {error}")
        if patterns:
            spot.made[name] = patterns
        return None

    def _read_property_count(self, spot: _Spot, name: str, value: Any) -> None:
        count = whole(value)
        if count is None:
            return self._refuse(spot, name, f"is {shown(value)}: a whole number")
        names = spot.schema.get("properties")
        names = set(names) if isinstance(names, dict) else set()
        required = spot.schema.get("required")
        required = set(map(str, required)) if isinstance(required, list) else set()
        if name == "minProperties":
            if count <= len(required):
                return None
            # names besides may come twice: the library does not know which came
            if names <= required and count == len(required) + 1:
                spot.made[name] = count
                return None
        elif names <= required or count == 0:
            spot.made[name] = min(count, MAX_REPEAT)
            return None
        elif spot.schema.get("additionalProperties") is False and count >= len(names):
            return None
        return self._refuse(spot, name, f"of {count} is not supported beside these properties")

    # arrays

    def _read_items(self, spot: _Spot, name: str, value: Any) -> None:
        if isinstance(value, list):  # before 2020-12
            spot.made["prefixItems"] = self._each(spot, name, value)
            if "additionalItems" in spot.schema:
                spot.made["items"] = self._schema(
                    spot.schema["additionalItems"], f"{spot.at}/{name}", spot.depth + 1
                )
        else:
            spot.made["items"] = self._schema(value, f"{spot.at}/{name}", spot.depth + 1)

    def _read_additionalItems(self, spot: _Spot, name: str, value: Any) -> None:
        pass  # it means something beside a list of items only, and is read with it

    def _read_prefixItems(self, spot: _Spot, name: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) > MAX_WIDTH:
            return self._refuse(spot, name, f"is no list of at most {MAX_WIDTH:,} schemas")
        spot.made[name] = self._each(spot, name, value)
        return None

    def _read_count(self, spot: _Spot, name: str, value: Any) -> None:
        count = whole(value)
        if count is None:
            return self._refuse(spot, name, f"is {shown(value)}: a whole number")
        if name.startswith("min") and count > MAX_REPEAT:
            return self._refuse(spot, name, f"is {count}: at most {MAX_REPEAT:,}")
        spot.made[name] = min(count, MAX_REPEAT)
        return None

    # texts

    def _read_pattern(self, spot: _Spot, name: str, value: Any) -> None:
        try:
            spot.also.append({"pattern": translate(value)})
        except (PatternError, TypeError) as error:
            return self._refuse(spot, "pattern", f"cannot be followed: {error}")
        return None

    def _read_format(self, spot: _Spot, name: str, value: Any) -> None:
        if value in REFUSED_FORMATS:
            return self._refuse(spot, "format", f"{value} is not supported")
        if _text(value) and value in FORMATS:
            spot.made["format"] = value
            if value in _FORMAT_PATTERNS:
                spot.also.append({"pattern": _FORMAT_PATTERNS[value]})
        return None

    # numbers

    def _read_bound(self, spot: _Spot, name: str, value: Any) -> None:
        if not is_number(value):
            return self._refuse(spot, name, f"is {shown(value)}: a number")
        is_lower = "inimum" in name
        # A bound that no double holds: nearer ones are within it.
        if abs(value) > MAX_WHOLE and (value < 0) == is_lower:
            value = -MAX_WHOLE if is_lower else MAX_WHOLE
        number = exact(value)
        if number is None or abs(number) > MAX_WHOLE:
            return self._refuse(spot, name, f"is {value!r}: between 1e-9 and 1e15, or whole and up to 2^53")
        spot.made[name] = number
        return None

    def _read_multipleOf(self, spot: _Spot, name: str, value: Any) -> None:
        if not is_number(value) or value <= 0:
            return self._refuse(spot, name, f"is {shown(value)}: a number above 0")
        number = exact(value)
        is_binary = value < 1 and float(value).hex().split("p")[0] == "0x1.0000000000000" and value >= 2**-6
        if number is None or not (is_binary or (float(value).is_integer() and value <= _MAX_MULTIPLE)):
            why = f"is {value!r}: a whole number up to {_MAX_MULTIPLE:,}, or 0.5, 0.25, ... 2^-6"
            return self._refuse(spot, name, why)
        spot.made[name] = number
        return None


# Keywords that say something of an object's names, here or where they lead.
_JOINT = {
    *("$ref", "allOf", "anyOf", "oneOf", "properties", "required", "additionalProperties"),
    *("patternProperties", "minProperties", "maxProperties"),
}
_ELSEWHERE = {"$ref", "allOf", "anyOf", "oneOf", "additionalProperties", "patternProperties"}


def _close(spot: _Spot) -> None:
    """Have an object of given names no others, unless something is said of others.

    The schema allows them; a model that invents some does not end.
    """
    properties = spot.made.get("properties")
    if not properties or spot.shared or _ELSEWHERE & spot.schema.keys() or "minProperties" in spot.made:
        return
    for name in spot.made.get("required", ()):
        properties.setdefault(name, True)
    spot.made["additionalProperties"] = False


_READERS: dict[str, str] = {
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), "choices"),
    **dict.fromkeys(("minProperties", "maxProperties"), "property_count"),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), "count"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "bound"),
}


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")[:80]
