"""ollama's requests as a ChatRequest or a CompletionRequest. Pure."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from ..request_parts import MAX_TOOLS, Loose, Strict, Text, Tool
from ..requests import MAX_INPUTS, MAX_MESSAGES, ChatRequest, CompletionRequest
from .common import chat_request, checked, no_pictures

# Its names of options, in ours; the others that it has say how it runs a model, which is the server's here.
_OPTIONS = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
}
_OF_RUNNING = frozenset(
    {"num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "num_keep", "numa"}
    | {"low_vram", "f16_kv", "vocab_only", "use_mlock", "repeat_last_n", "penalize_newline", "tfs_z"}
    | {"mirostat", "mirostat_tau", "mirostat_eta"}
)
_EFFORTS = {True: None, False: "none", "low": "low", "medium": "medium", "high": "high"}


class OllamaFunction(Loose):
    """A call that the model made: its arguments are an object here."""

    name: str = Field(min_length=1, max_length=256)
    arguments: dict[str, Any] | None = None


class OllamaCall(Loose):
    """A call of a tool."""

    id: str | None = None
    function: OllamaFunction


class OllamaMessage(Loose):
    """A message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None
    images: list[Any] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_call_id: str | None = None


class OllamaRequest(Strict):
    """What both ways to ask ollama take; it streams unless it is told not to."""

    model: str | None = Field(default=None, max_length=1000)
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = Field(default=None, description="json, or a schema")
    options: dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: Any = None


class OllamaChatRequest(OllamaRequest):
    """``POST /api/chat``."""

    messages: list[OllamaMessage] | None = Field(default=None, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)


class OllamaGenerateRequest(OllamaRequest):
    """``POST /api/generate``."""

    prompt: Text | None = None
    suffix: Text | None = None
    system: Text | None = None
    template: str | None = None
    raw: bool | None = Field(default=None, description="the prompt as it is, without the chat template")
    images: list[Any] | None = None
    context: Any = None


class OllamaEmbedRequest(Strict):
    """``POST /api/embed``."""

    model: str | None = Field(default=None, max_length=1000)
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    truncate: bool | None = None
    dimensions: int | None = Field(default=None, ge=1)
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class OllamaShowRequest(Strict):
    """``POST /api/show``."""

    model: str | None = Field(default=None, max_length=1000)
    name: str | None = Field(default=None, max_length=1000)
    verbose: bool | None = None


def to_chat(body: OllamaChatRequest) -> tuple[ChatRequest, list[str]]:
    """A chat in OpenAI's form, and what of it is not followed. Raises ApiError."""
    messages = [_message(one, f"messages.{i}") for i, one in enumerate(body.messages or ())]
    options, notes = _options(body)
    tools = [one.model_dump(exclude_none=True) for one in body.tools or ()] or None
    return chat_request(options | {"messages": messages, "tools": tools}), notes


def to_answer(body: OllamaGenerateRequest) -> tuple[ChatRequest | CompletionRequest, list[str]]:
    """A prompt as a chat of one message, or ``raw`` as it is. Raises ApiError."""
    if body.images:
        raise no_pictures("image", "images")
    options, notes = _options(body)
    if body.template:
        notes.append("a template is left out: the model has its own, and raw prompts are taken as they are")
    if body.raw or body.suffix:
        for name in ("response_format", "reasoning_effort", "thinking"):
            options.pop(name, None)
        kept = {name: one for name, one in options.items() if one is not None}
        return checked(CompletionRequest, kept | {"prompt": body.prompt or "", "suffix": body.suffix}), notes
    said = [{"role": "system", "content": body.system}] if body.system else []
    said.append({"role": "user", "content": body.prompt or ""})
    return chat_request(options | {"messages": said}), notes


def _options(body: OllamaRequest) -> tuple[dict[str, Any], list[str]]:
    given = {name: one for name, one in (body.options or {}).items() if one is not None}
    made = {_OPTIONS[name]: one for name, one in given.items() if name in _OPTIONS}
    if made.get("max_tokens") == -2:  # as many as the context has room for
        made["max_tokens"] = -1
    if made.get("stop") == []:
        del made["stop"]
    unknown = sorted(given.keys() - _OPTIONS.keys() - _OF_RUNNING)
    notes = [f"options not known here and left out: {', '.join(unknown)}"[:500]] if unknown else []
    if body.format == "json":
        made["response_format"] = {"type": "json_object"}
    elif isinstance(body.format, dict):
        made["response_format"] = {"type": "json_schema", "json_schema": {"schema": body.format}}
    if body.think is not None:
        made["reasoning_effort"] = _EFFORTS[body.think]
        made["thinking"] = {"type": "enabled" if body.think else "disabled"}
    return made | {"stream": body.stream is not False}, notes


def _message(given: OllamaMessage, where: str) -> dict[str, Any]:
    if given.images:
        raise no_pictures("image", f"{where}.images")
    made: dict[str, Any] = {"role": given.role, "content": given.content or ""}
    if given.thinking:
        made["reasoning_content"] = given.thinking
    if given.tool_call_id:
        made["tool_call_id"] = given.tool_call_id
    if given.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id or f"call_{i}",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(call.function.arguments or {}, ensure_ascii=False),
                },
            }
            for i, call in enumerate(given.tool_calls)
        ]
    return made
