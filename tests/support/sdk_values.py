"""Values of the types that a client's package has for its requests: one for each thing that may be sent."""

from __future__ import annotations

import collections.abc
import itertools
import types
import typing
from collections.abc import Iterator
from typing import Any

import typing_extensions

_PLAIN: dict[Any, tuple[Any, ...]] = {
    str: ("x",),
    int: (1,),
    float: (0.5,),
    bool: (True, False),
    type(None): (None,),
    object: ("x",),
    Any: ("x",),
}
_MANY = (list, tuple, set, collections.abc.Iterable, collections.abc.Sequence, collections.abc.Collection)
_DEPTH = 7


def fields(kind: Any) -> dict[str, Any]:
    """The type of each field of a TypedDict."""
    return typing_extensions.get_type_hints(kind, include_extras=True)


def values(kind: Any, depth: int = 0) -> Iterator[Any]:
    """At least one value of a type, and one for each of its choices; objects with what they need."""
    origin, given = typing_extensions.get_origin(kind), typing_extensions.get_args(kind)
    if origin in (typing_extensions.Required, typing_extensions.NotRequired, typing_extensions.Annotated):
        yield from values(given[0], depth)
    elif origin in (typing.Literal, typing_extensions.Literal):
        yield from given
    elif origin in (typing.Union, types.UnionType):
        for one in given:
            yield from values(one, depth)
    elif typing_extensions.is_typeddict(kind):
        yield from _objects(kind, depth)
    elif origin in _MANY or getattr(kind, "__name__", "") == "SequenceNotStr":
        yield from ([one] for one in values(given[0], depth)) if given else [["x"]]
    elif origin in (dict, collections.abc.Mapping):
        yield from ({"k": one} for one in values(given[1], depth))
    elif getattr(origin, "__name__", "") == "SequenceNotStr":
        yield from ([one] for one in values(given[0], depth))
    elif hasattr(kind, "model_fields"):
        return  # what was received, to be sent again: it is sent as the object of the same form
    elif kind in (dict, collections.abc.Mapping):
        yield {"k": "x"}
    else:
        yield from _PLAIN.get(kind, ("x",))


def _objects(kind: Any, depth: int) -> Iterator[dict[str, Any]]:
    hints = fields(kind)
    needed = [name for name, hint in hints.items() if _is_required(hint)]
    if depth >= _DEPTH:
        yield {}
        return
    least = {name: first(hints[name], depth + 1) for name in needed}
    yield least
    for name, hint in hints.items():
        found = values(hint, depth + 1)
        for value in itertools.islice(found, 1 if name in needed else 0, None):
            yield least | {name: value}


def _is_required(hint: Any) -> bool:
    # kind.__required_keys__ knows nothing of annotations that are text
    return typing_extensions.get_origin(hint) is typing_extensions.Required


def first(kind: Any, depth: int = 0) -> Any:
    """The first value of a type."""
    return next(iter(values(kind, depth)))
