"""Anthropic's requests as a ChatRequest. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ..request_parts import MAX_INT, Loose, Text, Whole
from ..requests import MAX_MESSAGES, Asked, ChatRequest, Stop
from .common import chat_request, function_tool, no_pictures, text_of, without_unknown, wrong

# What its client writes at the head of the system's text, another one in each request: it would cost the
# whole conversation's place in the context, and tells the model nothing.
_BILLING = "x-anthropic-billing-header:"
# Of a conversation with tools that are run elsewhere, or what only its own server can read.
_SKIPPED = {"redacted_thinking", "server_tool_use", "container_upload", "mcp_tool_use", "mcp_tool_result"}
_SKIPPED |= {"mcp_tool_listing", "fallback"}


class AnthropicMessage(Loose):
    """One turn; the blocks of its content are told apart by their type."""

    role: Literal["user", "assistant", "system"]
    content: Text | list[dict[str, Any]]


class ToolChoice(Loose):
    """Whether a tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Loose):
    """Whether the model is to think."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Whole | None = None


class OutputConfig(Loose):
    """How hard the model is to try, and what form its answer has."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(Asked):
    """``POST /v1/messages/count_tokens``."""

    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = Field(default=None, description="a JSON schema of the answer")
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: Whole | None = Field(default=None, ge=1, le=MAX_INT)
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    thread: Any = None
    compaction: Any = None


def to_chat(body: CountRequest) -> tuple[ChatRequest, list[str]]:
    """The same in OpenAI's form, and what of it is not followed. Raises ApiError."""
    _refuse(body)
    choice = body.tool_choice
    tools, notes = _tools(body.tools or [])
    messages = [*_system(body.system), *_all(body)]
    made: dict[str, Any] = {
        **body.options(),
        "messages": messages,
        "tools": tools,
        "tool_choice": _choice(choice, tools),
        "response_format": _format(body),
        "chat_template_kwargs": body.chat_template_kwargs,
        "thinking": _thinking(body.thinking),
        "max_tokens": getattr(body, "max_tokens", None),
        "stop": getattr(body, "stop_sequences", None) or None,
        "stream": body.stream,
    }
    if choice is not None and choice.disable_parallel_tool_use:
        made["parallel_tool_calls"] = False
    effort = body.output_config.effort if body.output_config is not None else None
    if effort is not None:
        made["reasoning_effort"] = effort
    return chat_request(made), notes


def _refuse(body: CountRequest) -> None:
    for name, why in (
        ("thread", "conversations are the client's: send all of their messages"),
        ("compaction", "ask for a summary in words"),
    ):
        if getattr(body, name, None) is not None:
            raise wrong(f"{name} is not done here: {why}", name)


def _tools(given: list[dict[str, Any]]) -> tuple[list[dict[str, Any]] | None, list[str]]:
    tools, skipped = [], []
    for i, tool in enumerate(given):
        kind = tool.get("type") or "custom"
        if kind != "custom":  # Anthropic runs these, or its models were trained on them
            skipped.append(str(kind))
            continue
        tools.append(
            function_tool(tool.get("name"), tool.get("description"), tool.get("input_schema"), f"tools.{i}")
        )
    return without_unknown(tools, skipped)


def _choice(choice: ToolChoice | None, tools: Any) -> Any:
    if choice is None or (not tools and choice.type == "auto"):
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": text_of(choice.name, "tool_choice.name")}}
    return {"any": "required"}.get(choice.type, choice.type)


def _format(body: CountRequest) -> dict[str, Any] | None:
    wanted = body.output_format
    if wanted is None and body.output_config is not None:
        wanted = body.output_config.format
    if wanted is None:
        return None
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), Mapping):
        raise wrong("the format of the answer must be a json_schema with its schema", "output_config.format")
    return {"type": "json_schema", "json_schema": {"schema": wanted["schema"]}}


def _thinking(given: Thinking | None) -> dict[str, Any] | None:
    if given is None:
        return None
    made = given.model_dump(exclude_none=True)
    return made | {"type": "adaptive"} if given.type == "between_tools" else made


def _system(given: str | list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    texts = [given] if isinstance(given, str) else _texts(given or [], "system")
    kept = [text for text in texts if text and not text.startswith(_BILLING)]
    if kept:
        yield {"role": "system", "content": "\n\n".join(kept)}


def _all(body: CountRequest) -> Iterator[dict[str, Any]]:
    for i, message in enumerate(body.messages):
        where = f"messages.{i}.content"
        content = message.content
        if isinstance(content, str):
            yield {"role": message.role, "content": content}
        elif message.role == "assistant":
            yield _assistant(content, where)
        else:
            yield from _user(message.role, content, where)


def _assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    words, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        kind, at = _kind(block, f"{where}.{i}"), f"{where}.{i}"
        if kind == "text":
            words.append(text_of(block.get("text"), f"{at}.text"))
        elif kind == "compaction":
            words += _texts([block], where, i)
        elif kind == "thinking":
            thoughts.append(text_of(block.get("thinking"), f"{at}.thinking"))
        elif kind == "tool_use":
            function = {
                "name": text_of(block.get("name"), f"{at}.name"),
                "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False),
            }
            calls.append(
                {"id": text_of(block.get("id"), f"{at}.id"), "type": "function", "function": function}
            )
        elif not _is_skipped(kind):
            raise no_pictures(kind, at)
    made: dict[str, Any] = {"role": "assistant", "content": "".join(words) or None}
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made


def _user(role: str, blocks: list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """What tools answered comes first, as a message each, and then what was said."""
    words = []
    for i, block in enumerate(blocks):
        at = f"{where}.{i}"
        if _kind(block, at) != "tool_result":
            words += _texts([block], where, i)
            continue
        content = block.get("content")
        texts = [content] if isinstance(content, str) else _texts(content or [], f"{at}.content")
        text = "\n".join(texts)
        if block.get("is_error"):
            text = f"Error: {text}"
        yield {
            "role": "tool",
            "tool_call_id": text_of(block.get("tool_use_id"), f"{at}.tool_use_id"),
            "content": text,
        }
    if words:
        yield {"role": role, "content": "\n\n".join(words)}


def _texts(blocks: Any, where: str, start: int = 0) -> list[str]:
    if not isinstance(blocks, list):
        raise wrong(f"{where} must be text or a list of blocks", where)
    found = []
    for i, block in enumerate(blocks, start):
        at = f"{where}.{i}"
        kind = _kind(block, at)
        if kind == "text":
            found.append(text_of(block.get("text"), f"{at}.text"))
        elif kind == "document":
            found += _document(block, at)
        elif kind == "search_result":
            head = [text_of(block.get(name), f"{at}.{name}") for name in ("title", "source")]
            found.append("\n".join([*head, *_texts(block.get("content"), f"{at}.content")]))
        elif kind == "compaction":  # what was said before, in few words
            found += [text_of(block["content"], f"{at}.content")] if block.get("content") is not None else []
        elif kind == "tool_reference":
            found.append(text_of(block.get("tool_name"), f"{at}.tool_name"))
        elif not _is_skipped(kind):
            raise no_pictures(kind, at)
    return found


def _document(block: Mapping[str, Any], at: str) -> list[str]:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if isinstance(source, Mapping) and kind == "text":
        return [text_of(source.get("data"), f"{at}.source.data")]
    if isinstance(source, Mapping) and kind == "content":
        content = source.get("content")
        return [content] if isinstance(content, str) else _texts(content, f"{at}.source.content")
    raise no_pictures("document", at)


def _kind(block: Any, where: str) -> str:
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        raise wrong(f"{where} must be a block with its type", where)
    return block["type"]


def _is_skipped(kind: str) -> bool:
    return kind in _SKIPPED or kind.endswith("_tool_result")
