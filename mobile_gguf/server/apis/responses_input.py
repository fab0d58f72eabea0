"""Requests of OpenAI's Responses API as a ChatRequest. Pure.

What a conversation holds beside messages, calls of functions and their outputs belongs to tools that its
servers run: it is left out, with a note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ..request_parts import MAX_INT, Loose, Text, Whole
from ..requests import Asked, ChatRequest, Effort
from .common import (
    chat_request,
    check_length,
    custom_tool,
    function_tool,
    no_pictures,
    text_of,
    without_unknown,
    wrong,
)

Item = dict[str, Any]

_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_CALLED = ("function", "custom")
_ROLES = ("user", "assistant", "system", "developer")


class Reasoning(Loose):
    """How much the model is to think."""

    effort: Effort | None = None


class TextConfig(Loose):
    """What form the answer has."""

    format: dict[str, Any] | None = None


class ResponsesRequest(Asked):
    """``POST /v1/responses``; null stands for what is not said."""

    input: Text | list[Item] | None = Field(default=None, description="text, or items of a conversation")
    instructions: Text | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Whole | None = Field(default=None, ge=1, le=MAX_INT)
    previous_response_id: str | None = Field(default=None, max_length=100)
    store: bool | None = Field(default=None, description="keep the answer in memory, to go on with by its id")
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: Whole | None = None
    include: list[str] | None = Field(
        default=None, description="message.output_text.logprobs; what else there is changes no answer here"
    )
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    stream_options: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _can_be_told(cls, given: Any) -> Any:
        """The same without halves of surrogate pairs: much of a request is told with its answer, or kept."""
        try:
            text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        try:
            text.encode()
        except UnicodeEncodeError:
            return json.loads(text.encode(errors="replace"))
        return given

    @property
    def wants_logprobs(self) -> bool:
        """Whether the words are to have them: clients ask in one of two places, or in both."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


def input_items(body: ResponsesRequest) -> list[Item]:
    """The items that a request adds to its conversation."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}]
    return list(body.input or ())


def to_chat(body: ResponsesRequest, items: Sequence[Item]) -> tuple[ChatRequest, list[str]]:
    """The request with all ``items`` of its conversation as a chat, and notes. Raises ApiError."""
    _refuse(body)
    check_length(items, "input")
    tools, notes = _tools(body.tools or [])
    choice, of_choice = _choice(body.tool_choice, tools)
    messages, of_items = _messages(items)
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    if not messages:
        raise wrong("input is missing: give text, or a list of items", "input")
    effort = body.reasoning.effort if body.reasoning is not None else None
    made = {
        **body.options(),
        "messages": messages,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_tokens": body.max_output_tokens,
        "response_format": _format(body.text.format if body.text is not None else None),
        "reasoning_effort": effort,
        "logprobs": body.wants_logprobs or None,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
        "chat_template_kwargs": body.chat_template_kwargs,
        "stream": body.stream,
    }
    if body.truncation == "disabled" and "context_full" not in made:
        made["context_full"] = "stop"
    return chat_request(made), notes + of_choice + of_items


def _refuse(body: ResponsesRequest) -> None:
    for name, why in (
        ("background", "an answer is made while its client waits"),
        ("conversation", "conversations are the client's: send their items as input"),
        ("prompt", "templates of prompts are not kept here: send instructions and input"),
    ):
        if getattr(body, name):
            raise wrong(f"{name} is not done here: {why}", name)


def _tools(given: list[dict[str, Any]]) -> tuple[list[dict[str, Any]] | None, list[str]]:
    tools, skipped = [], []
    for i, tool in enumerate(given):
        kind, at = tool.get("type"), f"tools.{i}"
        if kind == "custom":
            tools.append(custom_tool(tool.get("name"), tool.get("description"), tool.get("format"), at))
        elif kind == "function":
            tools.append(function_tool(tool.get("name"), tool.get("description"), tool.get("parameters"), at))
        else:
            skipped.append(str(kind))
    return without_unknown(tools, skipped)


def _choice(given: Any, tools: list[dict[str, Any]] | None) -> tuple[Any, list[str]]:
    if given is None or isinstance(given, str):
        return (None if given == "auto" else given), []
    kind = given.get("type")
    if kind in _CALLED:
        return _named(given, "tool_choice"), []
    if kind == "allowed_tools":
        names = {tool[tool["type"]]["name"] for tool in tools or ()}
        listed = given.get("tools") or []
        if not isinstance(listed, list):
            raise wrong("tool_choice.tools must be a list of tools", "tool_choice.tools")
        chosen = [one for one in listed if isinstance(one, Mapping) and isinstance(one.get("name"), str)]
        allowed = [_named(one, "tool_choice.tools") for one in chosen if one["name"] in names]
        if allowed:
            return {
                "type": "allowed_tools",
                "allowed_tools": {"mode": given.get("mode", "auto"), "tools": allowed},
            }, []
        return "none", ["tool_choice allows no function: none is called"]
    return None, [f"tool_choice is no function and left out: {str(kind)[:80]}"]


def _named(given: Mapping[str, Any], param: str) -> dict[str, Any]:
    kind = "custom" if given.get("type") == "custom" else "function"
    return {"type": kind, kind: {"name": text_of(given.get("name"), f"{param}.name")}}


def _format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") in (None, "text"):
        return None
    if given["type"] == "json_object":
        return {"type": "json_object"}
    if given["type"] != "json_schema":
        raise wrong("text.format must be of type text, json_object or json_schema", "text.format")
    return {"type": "json_schema", "json_schema": {"schema": given.get("schema")}}


class _Messages:
    """Messages of items: what the model thought, said and called one after another is one message."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self._turn: dict[str, Any] | None = None

    def of_assistant(self) -> dict[str, Any]:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": None}
            self.made.append(self._turn)
        return self._turn

    def say(self, role: str, text: str) -> None:
        if role != "assistant":
            self._turn = None
            self.made.append({"role": role, "content": text})
            return
        turn = self.of_assistant()
        if turn["content"] is not None or "tool_calls" in turn:
            self._turn = None
            turn = self.of_assistant()
        turn["content"] = text

    def think(self, text: str) -> None:
        if self._turn is not None and (self._turn["content"] is not None or "tool_calls" in self._turn):
            self._turn = None
        turn = self.of_assistant()
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def call(self, id: str, name: str, given: str, is_custom: bool = False) -> None:
        kind, text = ("custom", "input") if is_custom else ("function", "arguments")
        self.of_assistant().setdefault("tool_calls", []).append(
            {"id": id, "type": kind, kind: {"name": name, text: given}}
        )

    def result(self, id: str | None, text: str) -> None:
        self._turn = None
        self.made.append({"role": "tool", "tool_call_id": id, "content": text})


def _messages(items: Sequence[Item]) -> tuple[list[dict[str, Any]], list[str]]:
    messages = _Messages()
    for i, item in enumerate(items):
        _add(messages, item, f"input.{i}")
    kinds = ", ".join(dict.fromkeys(messages.skipped))
    notes = [f"items that are no part of a conversation are left out: {kinds}"] if kinds else []
    # a turn of which nothing was for the model
    made = [one for one in messages.made if len(one) > 2 or one["content"] is not None]
    return made, notes


def _add(messages: _Messages, item: Item, where: str) -> None:
    kind = item.get("type") or ("message" if "role" in item or "id" not in item else "item_reference")
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise wrong(f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
        messages.say(role, _text(item.get("content"), f"{where}.content"))
    elif kind == "function_call":
        messages.call(
            text_of(item.get("call_id") or item.get("id"), f"{where}.call_id"),
            text_of(item.get("name"), f"{where}.name"),
            text_of(item.get("arguments", ""), f"{where}.arguments"),
        )
    elif kind == "custom_tool_call":
        messages.call(
            text_of(item.get("call_id"), f"{where}.call_id"),
            text_of(item.get("name"), f"{where}.name"),
            text_of(item.get("input"), f"{where}.input"),
            is_custom=True,
        )
    elif kind in ("function_call_output", "custom_tool_call_output"):
        output = item.get("output")
        text = _text(output, f"{where}.output") if isinstance(output, (str, list)) else json.dumps(output)
        id = item.get("call_id")  # outputs of tools that nobody called have none
        messages.result(None if id is None else text_of(id, f"{where}.call_id"), text)
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list):
            raise wrong(f"{where}.content must be a list of parts", f"{where}.content")
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
        if said := "".join(text for text in texts if isinstance(text, str)):
            messages.think(said)
    elif kind == "item_reference":
        raise wrong(f"{where} refers to an item: send it whole, or go on with previous_response_id", where)
    else:
        messages.skipped.append(str(kind)[:80])


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{where} must be text or a list of parts", where)
    found = []
    for i, part in enumerate(content):
        at = f"{where}.{i}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise wrong(f"{at} must be a part with its type", at)
        if kind not in _TEXTS:
            raise no_pictures(kind, at)
        found.append(text_of(part.get(_TEXTS[kind]), f"{at}.{_TEXTS[kind]}"))
    return "".join(found)
