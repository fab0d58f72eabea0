"""What llama.cpp's chat parser makes of a template and messages: a prompt, and the form of its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mobile_gguf.errors import PromptTooLongError, UsageError

from .form import ANSWERING, Calls, Form, form_of
from .guide import is_triggered
from .left_out import left_out, without_large_counts

Apply = Callable[[dict[str, Any]], dict[str, Any]]


def ask(
    apply: Apply, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], calls: Calls | None
) -> tuple[str, Form]:
    """The prompt's text and the Form of its answer. Raises UsageError, PromptTooLongError.

    ``values`` are what the template may use, ``tools`` among them, which the prompt tells of; ``calls`` has
    those that may be called, as they are to be written. A tool whose parameters the parser cannot follow may
    have any, which a note says.
    """
    request = _request(messages, values)
    tools = [dict(tool) for tool in values.get("tools") or ()]
    told = {**request, "tools": tools, "tool_choice": "none"} if tools else request
    if calls is None:
        return _of(apply(told))
    callable_tools = [dict(tool) for tool in calls.tools]
    choice = {"tool_choice": "auto", "parallel_tool_calls": calls.parallel}
    notes = _unfollowed(callable_tools)
    callable_tools = [_with_parameters(tool, without_large_counts) for tool in callable_tools]
    try:
        made = apply({**request, **choice, "tools": callable_tools})
        is_told = callable_tools == tools
    except PromptTooLongError:
        raise
    except UsageError:
        apply(told)  # raises what is wrong beside the parameters
        callable_tools, freed = _freed(apply, {**request, **choice}, callable_tools)
        made = apply({**request, **choice, "tools": callable_tools})
        is_told, notes = False, notes + freed
    if calls.forced:
        form = _forced(apply, {**request, **choice, "tools": callable_tools}, _of(made)[1])
    else:
        form = _of(made)[1]
    prompt = made["prompt"] if is_told else apply(told)["prompt"]
    return prompt, replace(form, notes=tuple(notes))


def _with_parameters(tool: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    function = tool["function"]
    if "parameters" not in function:
        return tool
    return {**tool, "function": {**function, "parameters": change(function["parameters"])}}


def _unfollowed(tools: list[dict[str, Any]]) -> list[str]:
    names = {tool["function"]["name"]: left_out(tool["function"].get("parameters")) for tool in tools}
    return [f"tool {name}: not followed: {', '.join(words)}" for name, words in names.items() if words]


def _forced(apply: Apply, request: dict[str, Any], form: Form) -> Form:
    """A form in which a call comes at once, or behind thoughts that the prompt has begun.

    The parser's own of a call that is required allows any words before it, which a small model may never end.
    """
    if form.triggers and not any(is_triggered(trigger, form.opening) for trigger in form.triggers):
        return replace(form, when=ANSWERING)
    return _of(apply({**request, "tool_choice": "required"}))[1]


def _of(made: Mapping[str, Any]) -> tuple[str, Form]:
    key = hashlib.sha256(made["parser"].encode(errors="replace")).hexdigest()
    return made["prompt"], form_of(made, key)


def _request(messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in values.items() if name not in ("tools", "enable_thinking")}
    return {
        "messages": [_as_openai(message) for message in messages],
        "enable_thinking": values.get("enable_thinking") is not False,
        "values": others,
    }


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as JSON's text, as the parser wants them."""
    if not message.get("tool_calls"):
        return dict(message)
    return {**message, "tool_calls": [_call_as_openai(call) for call in message["tool_calls"]]}


def _call_as_openai(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {**call, "function": function}


def _freed(
    apply: Apply, request: dict[str, Any], tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The tools, with any arguments for those whose parameters cannot be followed, and notes of them."""
    made, notes = [], []
    for tool in tools:
        one = tool
        try:
            apply({**request, "tools": [one]})
        except UsageError as error:
            one = _with_parameters(one, lambda _parameters: {"type": "object"})
            reason = str(error).rpartition("messages: ")[2]
            notes.append(f"tool {one['function']['name']}: its parameters are left free: {reason}")
        made.append(one)
    return made, notes
