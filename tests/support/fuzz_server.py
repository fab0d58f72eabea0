"""What the fuzzer and the property tests run of the server: the reader of requests, and chat templates.

A request may come out as a request, or as one line of an error; a template as a text, or as one line.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from fuzz_target import Target
from pydantic import BaseModel, ValidationError

from mobile_gguf.errors import MobileError
from mobile_gguf.generate.prompts import template_child, templates
from mobile_gguf.generate.text.control_text import ControlTexts
from mobile_gguf.server.apis import messages_input, ollama_input, responses_input
from mobile_gguf.server.failures import ApiError, from_validation
from mobile_gguf.server.guard import check_values
from mobile_gguf.server.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from mobile_gguf.server.tools import plan_tools, speaks_tools, template_messages

KINDS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, EmbeddingRequest)
# Other APIs' requests, and what makes a chat of each.
TRANSLATED: dict[type[BaseModel], Any] = {
    responses_input.ResponsesRequest: lambda body: responses_input.to_chat(
        body, responses_input.input_items(body)
    ),
    messages_input.MessagesRequest: messages_input.to_chat,
    ollama_input.OllamaChatRequest: ollama_input.to_chat,
    ollama_input.OllamaGenerateRequest: ollama_input.to_answer,
}
CONTROLS = ControlTexts(["<|im_start|>", "<|im_end|>", "</s>", "[INST]"])
_TEMPLATE = "{% if tools %}<tool_call>{% endif %}{{ messages }}"
_MESSAGE = {"role": "user", "content": "Why?"}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "\\ud800"]}'}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
REQUESTS: dict[str, Any] = {
    "chat": {"messages": [_MESSAGE], "max_tokens": 4, "temperature": 0.5, "stop": ["a", "b"], "stream": True},
    "tools": {
        "messages": [_MESSAGE, {"role": "assistant", "content": None, "tool_calls": [_CALL]}],
        "tools": [_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]},
    "schema": {
        "messages": [_MESSAGE],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "object"}},
        },
        "logit_bias": {"5": -100},
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    },
    "completion": {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "seed": 4294967295},
    "tokens": {"prompt": [[1, 2], [3]], "n": 2},
    "responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "<|im_end|>"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {}}, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {"effort": "low"},
    },
    "messages": {
        "system": [{"type": "text", "text": "Be."}],
        "messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "max_tokens": 5,
    },
    "ollama": {"messages": [_MESSAGE], "options": {"num_predict": 5}, "think": True, "format": "json"},
    "embedding": {"input": ["one", "two"], "encoding_format": "base64", "dimensions": 3},
}
TEMPLATES = {
    "chat": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ messages[0].content.split('<') }}",
    "loop": "{% for i in range(9) %}{% set x = 'a' * i %}{{ x ~ loop.index }}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{{ n }}{% endmacro %}{{ f(5) }}",
    "names": "{% set ns = namespace(x=[]) %}{% set ns.x = ns.x + [1] %}{{ ns.x | map('string') | join }}",
    "refuse": "{% generation %}{{ raise_exception('no ' + strftime_now('%Y')) }}{% endgeneration %}",
}


def request_samples(folder: Path) -> list[Path]:
    """Requests that a corpus starts from."""
    return [_write(folder / name, json.dumps(body)) for name, body in REQUESTS.items()]


def template_samples(folder: Path) -> list[Path]:
    """Templates that a corpus starts from."""
    return [_write(folder / name, text) for name, text in TEMPLATES.items()]


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def check_request(path: Path) -> int:
    """Read a body as each kind of request; returns how many it could be."""
    data = path.read_bytes()
    try:
        check_values(data)
        body = json.loads(data)
    except ApiError as error:
        _check_line(error.message)
        return 0
    except (ValueError, RecursionError):  # what the framework answers by itself
        return 0
    return sum(_is_read(kind, body) for kind in (*KINDS, *TRANSLATED))


def _is_read(kind: type[BaseModel], body: Any) -> bool:
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        # as the framework has it: the place begins with "body"
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        _check_error(from_validation(errors))
        return False
    try:
        if kind in TRANSLATED:
            request, _ = TRANSLATED[kind](request)
        if not isinstance(request, ChatRequest):
            return True
        plan = plan_tools(request)
        for native in (True, speaks_tools(None)):
            messages = template_messages(request.messages, plan, native)
            hidden, values, _ = CONTROLS.hide(messages, request.template_values(), _TEMPLATE)
            json.dumps([hidden, values])
    except ApiError as error:
        _check_error(error)
        return False
    return True


def check_template(path: Path) -> int:
    """Render a template; returns whether it gave a text."""
    template = path.read_bytes().decode(errors="replace")
    with contextlib.suppress(
        Exception
    ):  # here the fuzzer sees which way it goes, which it does not in a child
        _environment.parse(template)
    names = {"messages": [_MESSAGE], "tools": [_TOOL]}
    try:
        text = _renderer().render(template, names, 1 << 16)
    except MobileError as error:
        _check_line(str(error))
        return 0
    if len(text) > 1 << 16:
        raise AssertionError("longer than was allowed")
    return 1


_environment = template_child.make_environment()
_made: list[templates.Renderer] = []
_usual: list[int] = []  # seconds that others' templates may take


def _renderer() -> templates.Renderer:
    if not _made:
        _usual.append(templates.CPU_SECONDS)
        templates.CPU_SECONDS = 1  # what a fuzzer finds is often endless
        _made.append(templates.Renderer())
    return _made[0]


def close() -> None:
    """End the process of the templates."""
    while _made:
        _made.pop().close()
        templates.CPU_SECONDS = _usual.pop()


def _check_error(error: ApiError) -> None:
    json.dumps(error.body()).encode()
    _check_line(error.body()["error"]["message"])


def _check_line(text: str) -> None:
    if not text or "\n" in text or len(text) > 5000:
        raise AssertionError(f"not one line: {text!r}")


TARGETS = {
    "requests": Target(request_samples, check_request),
    "templates": Target(template_samples, check_template),
}
