"""What several translations share: a request built from another one's, and the text in its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..failures import ApiError, from_validation
from ..request_parts import MAX_TOOLS
from ..requests import MAX_MESSAGES, ChatRequest

T = TypeVar("T", bound=BaseModel)


def chat_request(made: Mapping[str, Any]) -> ChatRequest:
    """The request of OpenAI's form that another API's means; ``None`` is as if it were not there.

    Raises ApiError for what the translation could not know to be wrong.
    """
    return checked(ChatRequest, {name: one for name, one in made.items() if one is not None})


def checked(kind: type[T], made: Mapping[str, Any]) -> T:
    """A request of some ``kind``. Raises ApiError for what is wrong with it."""
    try:
        return kind.model_validate(made)
    except ValidationError as error:
        raise from_validation([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def wrong(message: str, param: str) -> ApiError:
    """What a client is told of a part that cannot be translated."""
    return ApiError(400, message, param=param, code="invalid_value")


def check_length(items: Iterable[Any], param: str) -> None:
    """Refuse a conversation of more parts than there may be."""
    if sum(1 for _ in items) > MAX_MESSAGES:
        raise wrong(f"{param} holds more than {MAX_MESSAGES} parts", param)


def text_of(value: Any, param: str) -> str:
    """A value that has to be text."""
    if not isinstance(value, str):
        raise wrong(f"{param} must be text", param)
    return value


def no_pictures(kind: str, param: str) -> ApiError:
    """What a client is told that sends what is no text."""
    return wrong(f"{param} is of type {kind[:80]!r}: this server takes text only", param)


def function_tool(name: Any, description: Any, parameters: Any, param: str) -> dict[str, Any]:
    """OpenAI's tool of a function."""
    return _tool("function", name, description, {"parameters": parameters}, param)


def custom_tool(name: Any, description: Any, form: Any, param: str) -> dict[str, Any]:
    """OpenAI's tool that takes a text."""
    return _tool("custom", name, description, {"format": form}, param)


def _tool(kind: str, name: Any, description: Any, objects: dict[str, Any], param: str) -> dict[str, Any]:
    made: dict[str, Any] = {"name": text_of(name, f"{param}.name")}
    if isinstance(description, str):
        made["description"] = description
    made |= {field: value for field, value in objects.items() if isinstance(value, Mapping)}
    return {"type": kind, kind: made}


def without_unknown(
    tools: list[dict[str, Any]], skipped: list[str]
) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The tools or none, and a note of the kinds that were left out."""
    if len(tools) > MAX_TOOLS:
        raise wrong(f"tools holds more than {MAX_TOOLS} functions", "tools")
    kinds = ", ".join(dict.fromkeys(kind[:80] for kind in skipped))
    notes = [f"tools that are no functions are left out: {kinds}"] if skipped else []
    return tools or None, notes
