"""Every part of a whole request of each endpoint, one after the other made into what it may not be.

    mobile-gguf serve MODEL -c 1024 -n 40 --embeddings --alias fake
    python tests/support/hostile_fields.py http://127.0.0.1:8080 [EVERY]

The requests hold all that an endpoint knows; ``damaged`` says what each becomes. What a server may say of
one is ``hostile.sent``'s to judge.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
from hostile import ODD, WrongAnswerError, sent

_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_FUNCTION = {"name": "f", "description": "d", "parameters": _SCHEMA}
_TOOL = {"type": "function", "function": _FUNCTION}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "logit_bias": {"5": 1},
    "mode": "exact",
    "presence_penalty": 0.1,
    "reasoning_budget": 3,
    "model": None,
    "stream": False,
    "cache_prompt": True,
}
_CUSTOM = {"type": "custom", "custom": {"name": "p", "description": "d", "format": {"type": "text"}}}
_CUSTOM_CALL = {"id": "k", "type": "custom", "custom": {"name": "p", "input": "t"}}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}
_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n"},
        {"role": "assistant", "content": None, "reasoning_content": "t", "tool_calls": [_CALL, _CUSTOM_CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "tool", "tool_call_id": "k", "content": "2"},
    ],
    "tools": [_TOOL, _CUSTOM],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_effort": "low",
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "prediction": {"type": "content", "content": "x"},
    "logprobs": True,
    "top_logprobs": 2,
    "max_tokens": 3,
    "stop": ["q"],
    "n": 1,
    "stream_options": {"include_usage": True},
}
_RESPONSES: dict[str, Any] = {
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]},
        {"type": "custom_tool_call", "call_id": "d", "name": "f", "input": "z"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "2"},
    ],
    "instructions": "i",
    "tools": [
        {"type": "function", **_FUNCTION},
        {"type": "custom", "name": "p", "description": "d", "format": {"type": "text"}},
        {"type": "web_search"},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "parallel_tool_calls": True,
    "max_output_tokens": 3,
    "previous_response_id": None,
    "store": False,
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "text"}},
    "truncation": "auto",
    "metadata": {"a": "b"},
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 1,
    "stream_options": {},
    "chat_template_kwargs": {},
    "background": False,
    "conversation": None,
    "prompt": None,
    "max_tool_calls": 3,
}
_MESSAGES: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c",
                    "content": [{"type": "text", "text": "1"}],
                    "is_error": True,
                },
                {"type": "document", "source": {"type": "text", "data": "d"}},
                {
                    "type": "search_result",
                    "title": "t",
                    "source": "u",
                    "content": [{"type": "text", "text": "c"}],
                },
            ],
        },
    ],
    "system": [{"type": "text", "text": "s"}],
    "tools": [
        {"name": "f", "description": "d", "input_schema": _SCHEMA},
        {"type": "bash_20250124", "name": "bash"},
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"effort": "low"},
    "max_tokens": 3,
    "stop_sequences": ["q"],
    "metadata": {"user_id": "u"},
}
_OPTIONS = {"num_predict": 3, "temperature": 0.5, "top_k": 5, "stop": ["q"], "seed": 1, "num_ctx": 9}
_OLLAMA: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "x", "images": []},
        {
            "role": "assistant",
            "content": "",
            "thinking": "t",
            "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ],
    "tools": [_TOOL],
    "options": _OPTIONS,
    "think": True,
    "format": "",
    "keep_alive": 5,
    "model": None,
    "stream": False,
}
_GENERATE = {
    "prompt": "x",
    "system": "s",
    "options": _OPTIONS,
    "think": "low",
    "format": _SCHEMA,
    "stream": False,
}
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _SAMPLING | _CHAT,
    "/v1/chat/completions?json": _SAMPLING
    | {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "response_format": _FORMAT},
    "/v1/completions": _SAMPLING
    | {"prompt": ["x", "y"], "max_tokens": 2, "echo": True, "logprobs": 1, "best_of": 1, "stop": "q"},
    "/v1/completions?suffix": _SAMPLING | {"prompt": "x", "suffix": "y", "max_tokens": 2, "best_of": 1},
    "/v1/embeddings": {"input": ["x"], "encoding_format": "float", "dimensions": 2, "user": "u"},
    "/apply-template": _CHAT,
    "/v1/responses": _SAMPLING | _RESPONSES,
    "/v1/responses/input_tokens": _RESPONSES,
    "/v1/messages": _SAMPLING | _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/api/chat": _OLLAMA,
    "/api/generate": _GENERATE,
    "/api/generate?raw": _GENERATE | {"raw": True, "template": "t", "context": [1], "images": []},
    "/api/embed": {
        "input": ["x"],
        "truncate": True,
        "dimensions": 2,
        "options": _OPTIONS,
        "keep_alive": "5m",
    },
    "/api/show": {"model": "fake", "name": "fake", "verbose": True},
    "/tokenize": {"content": "x", "add_special": True, "parse_special": False, "with_pieces": True},
    "/detokenize": {"tokens": [5, 6]},
    "/completion": _SAMPLING | {"prompt": "x", "n_predict": 3, "stop": ["q"], "echo": True},
    "/infill": _SAMPLING
    | {"input_prefix": "a", "input_suffix": "b", "prompt": "c", "n_predict": 3}
    | {"input_extra": [{"filename": "f", "text": "t"}], "samplers": ["top_k"], "t_max_predict_ms": 5},
    "/v1/rerank": {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": True},
    "/slots/0?action=save": {"filename": "x"},
    "/slots/0?action=restore": {"filename": "x"},
}
_WRONG: list[Any] = [*ODD, [None], [5], {"type": 5}, {"type": "text"}, {"text": "x"}, "auto", "x" * 70_000]


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from _places(one, (*at, key))


def damaged(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is damaged, and the body: each part in turn left out, and made into each of what is wrong."""
    whole = WHOLE[path]
    for at in _places(whole):
        for wrong in [..., *_WRONG]:
            body = copy.deepcopy(whole)
            holder: Any = body
            for key in at[:-1]:
                holder = holder[key]
            if wrong is ...:
                del holder[at[-1]]
            else:
                holder[at[-1]] = wrong
            yield f"{'.'.join(map(str, at))} = {str(wrong)[:40]!r}", body


def sweep(url: str, path: str, every: int = 1, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Send each ``every``-th damaged request; returns how many had which status, and what was wrong."""
    found: Counter[str] = Counter()
    wrong = []
    for i, (what, body) in enumerate(damaged(path)):
        if i % every == first % every:
            try:
                found[sent(url, json.dumps(body).encode(), path)] += 1
            except (WrongAnswerError, httpx.TransportError) as error:
                wrong.append(f"{path}: {what}: {error!r}")
    return found, wrong


def main() -> int:
    """The command line."""
    url, every = sys.argv[1], int((sys.argv[2:] or ["1"])[0])
    n_wrong = 0
    for name in WHOLE:
        found, wrong = sweep(url, name, every)
        print(name, dict(found), *wrong, sep="\n  ", flush=True)
        n_wrong += len(wrong)
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
