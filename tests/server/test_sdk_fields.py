"""All that the OpenAI and Anthropic packages can send, by their own types: taken, or refused in a line.

A newer package has more: what nobody knows is left out with a note, which is an outcome that is fine here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("anthropic", reason="pip install 'mobile-gguf[dev]'")
pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import input_token_count_params, response_create_params
from sdk_values import fields, values

from mobile_gguf.server.apis import messages_input, responses_input
from mobile_gguf.server.apis.common import checked
from mobile_gguf.server.failures import ApiError
from mobile_gguf.server.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    unknown_names,
)
from mobile_gguf.server.tools import plan_tools, template_messages

Notes = list[str]
SAYS = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object"}
MANY = 2500  # values of one field; the rest of its type says little that is new


def said(chat: ChatRequest) -> None:
    plan = plan_tools(chat)
    for native in (True, False):
        template_messages(chat.messages, plan, native)
    chat.template_values()
    chat.options()


def of_chat(body: dict[str, Any]) -> Notes:
    chat = checked(ChatRequest, body)
    said(chat)
    return unknown_names(chat)


def of_completions(body: dict[str, Any]) -> Notes:
    return unknown_names(checked(CompletionRequest, body))


def of_embeddings(body: dict[str, Any]) -> Notes:
    return unknown_names(checked(EmbeddingRequest, body))


def of_responses(body: dict[str, Any]) -> Notes:
    asked = checked(responses_input.ResponsesRequest, body)
    chat, notes = responses_input.to_chat(asked, responses_input.input_items(asked))
    said(chat)
    return notes + unknown_names(asked)


def of_messages(body: dict[str, Any]) -> Notes:
    return of_anthropic(checked(messages_input.MessagesRequest, body))


def of_count(body: dict[str, Any]) -> Notes:
    return of_anthropic(checked(messages_input.CountRequest, body))


def of_anthropic(asked: messages_input.CountRequest) -> Notes:
    chat, notes = messages_input.to_chat(asked)
    said(chat)
    return notes + unknown_names(asked)


CHAT = {
    "messages": [SAYS],
    "tools": [
        {"type": "function", "function": {"name": "x"}},
        {"type": "custom", "custom": {"name": "x"}},
    ],
}
RESPONSES = {"input": [SAYS], "tools": [{"type": "function", "name": "x"}]}
MESSAGES = {"messages": [SAYS], "tools": [{"name": "x", "input_schema": SCHEMA}]}
# What is asked, the type of its requests, a request, and how one is read.
APIS: dict[str, tuple[Any, dict[str, Any], Callable[[dict[str, Any]], Notes]]] = {
    "chat": (chat_params.CompletionCreateParamsBase, CHAT, of_chat),
    "completions": (
        completion_create_params.CompletionCreateParamsBase, {"prompt": "x"}, of_completions
    ),
    "embeddings": (embedding_create_params.EmbeddingCreateParams, {"input": "x"}, of_embeddings),
    "responses": (response_create_params.ResponseCreateParamsBase, RESPONSES, of_responses),
    "input_tokens": (input_token_count_params.InputTokenCountParams, RESPONSES, of_responses),
    "messages": (message_create_params.MessageCreateParamsBase, MESSAGES | {"max_tokens": 3}, of_messages),
    "count_tokens": (message_count_tokens_params.MessageCountTokensParams, MESSAGES, of_count),
    "beta": (beta_params.MessageCreateParamsBase, MESSAGES | {"max_tokens": 3}, of_messages),
}  # fmt: skip
CASES = [(api, name) for api, (kind, _, _) in APIS.items() for name in fields(kind)]
# Fields of which nothing but null, if that, is taken: what is asked is not done here.
REFUSED = {
    ("chat", "audio"),
    ("chat", "functions"),
    ("beta", "thread"),
    ("beta", "compaction"),
}
# Fields of which some of what may be asked is not done, and the words that say so.
PARTLY = {
    "messages": ("takes text only", "may not be", "must be"),
    "input": ("takes text only", "refers to an item", "input is missing"),
    "function_call": ("give tool_choice",),
    "modalities": ("answers with text only",),
    "logit_bias": ("[0-9]",),  # its type does not say that keys are numbers
    "tool_choice": ("tool_choice.allowed_tools.tools.0.type", "tool_choice.name"),  # as little
    "prompt": ("prompt",),
    "background": ("not done here",),
    "conversation": ("not done here",),
}


def outcomes(api: str, name: str) -> tuple[Counter[str], set[str]]:
    """How many values of a field were taken, noted and refused, and what was said of the last."""
    kind, body, read = APIS[api]
    found: Counter[str] = Counter()
    lines = set()
    for value in itertools.islice(values(fields(kind)[name]), MANY):
        given = value
        if name in ("messages", "input") and isinstance(value, list) and api != "embeddings":
            given = [SAYS, *value]  # a conversation of nothing is refused for itself
        try:
            found["noted" if read(body | {name: given}) else "taken"] += 1
        except ApiError as error:
            found["refused"] += 1
            lines.add(error.message if error.status == 400 else f"{error.status}")
    return found, lines


@pytest.mark.parametrize(("api", "name"), CASES)
def test_what_clients_can_send_is_taken_or_refused_in_one_line(api: str, name: str) -> None:
    found, lines = outcomes(api, name)
    assert sum(found.values()) > 0
    for line in lines:
        assert line.isprintable()
        assert name in line, "an error says which field it is about"
        assert len(line) < 300
    if (api, name) in REFUSED:
        assert found["refused"] >= 1
        return
    assert found["taken"] + found["noted"] > 0, (found, lines)
    if found["refused"]:
        assert all(any(words in line for words in PARTLY.get(name, ())) for line in lines), (found, lines)


def test_every_field_of_today_is_known() -> None:
    """What is noted as unknown, of the packages as they were looked at: nothing else is."""
    unknown = set()
    for api, name in CASES:
        kind, body, read = APIS[api]
        for value in itertools.islice(values(fields(kind)[name]), 1):
            try:
                if name in read(body | {name: value}):
                    unknown.add(name)
            except ApiError:
                pass
    # those ask for something, of which the note says that it is not done
    assert {"moderation", "mcp_servers", "personality"} & {name for _, name in CASES} <= unknown
    assert not unknown & KNOWN


KNOWN = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "speed"),
    *("prompt_cache_options", "prompt_cache_retention", "verbosity", "web_search_options", "container"),
    *("inference_geo", "cache_control", "diagnostics", "context_management", "betas", "fallbacks"),
    *("user_profile_id", "workspace_id", "billing_policy", "access_programs", "background_options", "image"),
    *("include", "stream_options", "max_tool_calls", "top_logprobs", "logprobs", "reasoning_effort"),
    *("reasoning", "text", "truncation", "thinking", "output_config", "stop_sequences", "suffix", "best_of"),
}


@pytest.mark.parametrize("planted", ["a field of types alone", "an effort", "a line"])
def test_a_gap_would_be_seen(monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    def refuse(message: str, of: Callable[[dict[str, Any]], bool]) -> None:
        kind, body, read = APIS["chat"]

        def wrong(given: dict[str, Any]) -> Notes:
            if of(given):
                raise ApiError(400, message)
            return read(given)

        monkeypatch.setitem(APIS, "chat", (kind, body, wrong))

    name = "reasoning_effort"
    if planted == "a field of types alone":
        refuse("reasoning_effort", lambda body: name in body)
    elif planted == "an effort":
        refuse("reasoning_effort may not be max", lambda body: body.get(name) == "max")
    else:
        name = "tools"
        refuse("no", lambda body: body["tools"][0]["type"] == "custom")
    with pytest.raises(AssertionError):
        test_what_clients_can_send_is_taken_or_refused_in_one_line("chat", name)
