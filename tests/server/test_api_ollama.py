"""ollama's API and llama-server's: requests as chats, events as lines. No engine."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from api_events import CALLED, SPOKEN, THOUGHT_AND_CALLED, USAGE, frames_of

from mobile_gguf.server.apis.llamacpp import TextForm
from mobile_gguf.server.apis.ollama_input import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    to_answer,
    to_chat,
)
from mobile_gguf.server.apis.ollama_output import OllamaForm
from mobile_gguf.server.failures import ApiError
from mobile_gguf.server.requests import ChatRequest, CompletionRequest

USER = {"role": "user", "content": "hi"}


def chat(**body: Any) -> Any:
    return to_chat(OllamaChatRequest.model_validate({"messages": [USER]} | body))


def test_options_have_their_names_here() -> None:
    options = {"num_predict": 5, "temperature": 0.1, "num_ctx": 4096, "seed": 3, "stop": [], "warp": 9}
    made, notes = chat(options=options, keep_alive="5m")
    dumped = made.model_dump(exclude_none=True)
    assert (made.max_tokens, dumped["temperature"], dumped["seed"], made.stream) == (5, 0.1, 3, True)
    assert notes == ["options not known here and left out: warp"]
    assert chat(options={"num_predict": -2})[0].max_tokens == -1
    assert chat(stream=False)[0].stream is False


@pytest.mark.parametrize(
    ("think", "values"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("high", {"enable_thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_whether_it_thinks_is_the_templates(think: Any, values: dict[str, Any]) -> None:
    assert chat(think=think)[0].template_values() == values


def test_formats_and_calls() -> None:
    assert chat(format="json")[0].response_format.type == "json_object"
    assert chat(format={"type": "object"})[0].response_format.json_schema.schema_ == {"type": "object"}
    assert chat(format="")[0].response_format is None
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turn = {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]}
    made, _ = chat(messages=[USER, turn, {"role": "tool", "tool_name": "add", "content": "2"}])
    assert made.messages[1].tool_calls[0].function.arguments == '{"a": 1}'
    assert made.messages[1].reasoning_content == "hm"
    assert made.messages[2].content == "2"
    with pytest.raises(ApiError, match="text only"):
        chat(messages=[USER | {"images": ["x"]}])


def test_a_prompt_is_a_chat_of_one_message_or_raw() -> None:
    made, notes = to_answer(OllamaGenerateRequest(prompt="p", system="s", template="{{ .Prompt }}"))
    assert isinstance(made, ChatRequest)
    assert [(one.role, one.content) for one in made.messages] == [("system", "s"), ("user", "p")]
    assert len(notes) == 1
    made, _ = to_answer(OllamaGenerateRequest(prompt="p", raw=True, options={"num_predict": 2}))
    assert isinstance(made, CompletionRequest)
    assert (made.prompt, made.max_tokens) == ("p", 2)


def test_lines_of_a_stream() -> None:
    told = [data for _, data in frames_of(OllamaForm("m", chat=True), THOUGHT_AND_CALLED)]
    assert [one["done"] for one in told] == [False] * (len(told) - 1) + [True]
    assert "".join(one["message"].get("thinking", "") for one in told) == "hm so"
    assert "".join(one["message"]["content"] for one in told) == "I add."
    calls = [call for one in told for call in one["message"].get("tool_calls", ())]
    assert calls == [{"id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}]
    last = told[-1]
    assert (last["prompt_eval_count"], last["eval_count"], last["done_reason"]) == (7, 5, "stop")
    texts = [data["response"] for _, data in frames_of(OllamaForm("m", chat=False), SPOKEN)]
    assert "".join(texts) == "hello there\n"


@pytest.mark.parametrize("events", [SPOKEN, CALLED, THOUGHT_AND_CALLED])
def test_whole_and_streamed_say_the_same(events: Any) -> None:
    whole = OllamaForm("m", chat=True).whole(list(events), USAGE)["message"]
    told = [data["message"] for _, data in frames_of(OllamaForm("m", chat=True), events)]
    assert "".join(one["content"] for one in told) == whole["content"]
    assert [call for one in told for call in one.get("tool_calls", ())] == whole.get("tool_calls", [])


def test_a_failure_is_the_last_line() -> None:
    told = frames_of(OllamaForm("m", chat=True), SPOKEN[:2], fails=ApiError(503, "cut"))
    assert told[-1] == (None, {"error": "cut"})


def test_completions_in_llama_servers_form() -> None:
    whole = TextForm("m").whole(list(SPOKEN), USAGE)
    assert (whole["content"], whole["stop"], whole["stop_type"]) == ("hello there\n", True, "eos")
    assert (whole["tokens_predicted"], whole["tokens_evaluated"], whole["timings"]["cache_n"]) == (5, 7, 3)
    told = [data for _, data in frames_of(TextForm("m"), SPOKEN)]
    assert "".join(one["content"] for one in told) == "hello there\n"
    assert [one["stop"] for one in told] == [False, False, False, True]
