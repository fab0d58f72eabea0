"""Tool calls: what the model is told of tools, and the grammar and parser of the calls it makes.

Where the form of the model's own calls is known (``mobile_gguf.generate.form``), they are made in it. This is
what is done elsewhere: with a stock library, and for templates that know no tools.

A call is written as ``<tool_call>`` and ``{"name": ..., "arguments": {...}}``, which Qwen and many others
were trained on. A chat template that speaks of tools that way is given them; to the others they are told in
the system message. Once the marker has appeared, the rest of a call is generated under a grammar made
of the tools' schemas, so that a call is always valid JSON for one of them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobile_gguf.generate.form.form import Calls
from mobile_gguf.generate.form.reading import CallDelta

from .failures import ApiError
from .request_parts import AllowedToolsChoice, Message, NamedTool, Tool
from .requests import ChatRequest
from .schemas import call_schema

MARK, END_MARK = "<tool_call>", "</tool_call>"
MAX_CALLS = 16

_TEACHING = """You may call functions. The functions, as JSON, one a line:
{tools}
To call one, write {mark} and then a JSON object with its name and arguments, then {end}, like this:
{mark}
{{"name": "FUNCTION", "arguments": {{"ARGUMENT": "VALUE"}}}}
{end}
Call a function only when it helps; otherwise answer in words."""


@dataclass(frozen=True)
class ToolPlan:
    """The tools of a request; ``callable`` those that may be called, ``forced`` if one has to be."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    forced: bool
    parallel: bool

    @property
    def custom_names(self) -> set[str]:
        """The names of those that take a text."""
        return {tool.told.name for tool in self.callable if tool.type == "custom"}

    @property
    def notes(self) -> list[str]:
        """What of the tools is not followed, a line each."""
        return [note for tool in self.callable for note in tool.notes]

    def of_form(self) -> Calls:
        """The same for a prompt that knows how its model writes calls."""
        tools = tuple(tool.as_function() for tool in self.callable)
        return Calls(tools, self.forced, self.parallel)

    def schema(self) -> tuple[dict[str, Any], list[str]]:
        """JSON schema of one call, and what of the tools' parameters it leaves free, a line each."""
        return call_schema([(tool.told.name, tool.told.parameters) for tool in self.callable])


def plan_tools(request: ChatRequest) -> ToolPlan | None:
    """What a request wants of tools; None if nothing. Raises ApiError for a choice that cannot be made."""
    choice, tools = request.tool_choice, tuple(request.tools or ())
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
        return None
    if choice == "none":
        return None
    parallel = request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        return ToolPlan(tools, _named(tools, [choice])[:1], forced=True, parallel=False)
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        return ToolPlan(tools, _named(tools, allowed.tools), allowed.mode == "required", parallel)
    return ToolPlan(tools, tools, forced=choice == "required", parallel=parallel)


def _named(tools: Sequence[Tool], chosen: Sequence[NamedTool]) -> tuple[Tool, ...]:
    """Those of ``tools`` that are chosen. Raises ApiError for one that is not among them."""
    names = {tool.told.name for tool in tools}
    for choice in chosen:
        if choice.name not in names:
            raise ApiError(400, f"tool_choice {choice.name!r} is not among the tools", param="tool_choice")
    wanted = {choice.name for choice in chosen}
    return tuple(tool for tool in tools if tool.told.name in wanted)


def speaks_tools(template: str | None) -> bool:
    """Whether a chat template takes tools, and has them called as here."""
    return template is not None and MARK in template and "tools" in template


def template_messages(
    messages: Sequence[Message], plan: ToolPlan | None, native: bool
) -> list[dict[str, Any]]:
    """Messages for the chat template; with tools told in words unless it is ``native`` to them."""
    made = [_native(message) for message in messages] if native else _all_in_words(messages)
    if plan is not None and not native:
        lines = "\n".join(json.dumps(tool.told.model_dump(exclude_none=True)) for tool in plan.tools)
        text = _TEACHING.format(tools=lines, mark=MARK, end=END_MARK)
        if made[0]["role"] == "system":
            made[0]["content"] = f"{made[0]['content']}\n\n{text}"
        else:
            made.insert(0, {"role": "system", "content": text})
    return made


def _text(message: Message) -> str:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal or "" for part in content)


def _role(message: Message) -> str:
    return {"developer": "system", "function": "tool"}.get(message.role, message.role)


def _arguments(text: str) -> Any:
    try:
        made = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    try:
        json.dumps(made, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise ApiError(
            400,
            "the arguments of an earlier tool call are nested too deeply, or hold half a surrogate pair",
            param="messages",
            code="invalid_value",
        ) from None
    return made


def _native(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    if message.reasoning_content:
        made["reasoning_content"] = message.reasoning_content
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        # templates write arguments as JSON themselves
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.told.name, "arguments": _arguments(call.told.arguments)},
            }
            for call in message.tool_calls
        ]
    return made


def _all_in_words(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without tools, in which what tools and the user say one after the other is one message.

    Many templates want the user and the assistant to take turns.
    """
    made: list[dict[str, Any]] = []
    after_tool = False
    for message in messages:
        told, is_tool = _in_words(message), _role(message) == "tool"
        if made and told["role"] == made[-1]["role"] == "user" and (is_tool or after_tool):
            made[-1]["content"] += f"\n{told['content']}"
            after_tool = True
        else:
            made.append(told)
            after_tool = is_tool
    return made


def _in_words(message: Message) -> dict[str, Any]:
    text, role = _text(message), _role(message)
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    for call in message.tool_calls or ():
        body = {"name": call.told.name, "arguments": _arguments(call.told.arguments)}
        text += f"{text and chr(10)}{MARK}\n{json.dumps(body, ensure_ascii=False)}\n{END_MARK}"
    thought = {"reasoning_content": message.reasoning_content} if message.reasoning_content else {}
    return {"role": role, "content": text, **thought}


class CallParser:
    """Reads a call as it is generated; the grammar has made sure of its form."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._text = ""
        self._named = False
        self._depth = 0
        self._quoted = self._escaped = self._done = False

    def push(self, text: str) -> list[CallDelta]:
        """Take more of the call's text; returns what is now known of it."""
        if self._named:
            return self._arguments(text)
        self._text += text
        decoder = json.JSONDecoder()
        _, key, after = self._text.partition('"name"')
        colon = after.find(":")
        if not key or colon < 0:
            return []
        try:
            name, end = decoder.raw_decode(after[colon + 1 :].lstrip())
        except ValueError:
            return []
        rest = after[colon + 1 :].lstrip()[end:]
        _, key, body = rest.partition('"arguments"')
        start = body.find("{")
        if not key or start < 0:
            return []
        self._named = True
        first = CallDelta(self._index, "call_" + secrets.token_hex(12), str(name))
        return [first, *self._arguments(body[start:])]

    def _arguments(self, text: str) -> list[CallDelta]:
        kept = ""
        for character in text:
            if self._done:
                break
            kept += character
            self._follow(character)
        return [CallDelta(self._index, arguments=kept)] if kept else []

    def _follow(self, character: str) -> None:
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            else:
                self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._done = self._depth == 0
