"""What agents and libraries were seen to send, answered; and a long conversation, which computes what is new.

The bodies were recorded from the clients that docs/clients.md names, against this server; long texts in them
are cut to their length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from places import DATA
from server_harness import phases, running

from mobile_gguf.api.model import Model
from mobile_gguf.options import LoadOptions
from mobile_gguf.server.produce import IN_WORDS

BODIES = sorted((DATA / "agents").glob("*.json"))
N_CTX = 1 << 16
# What a client's request is answered without, by its recording.
NOTES = {"codex": ["tools that are no functions are left out: namespace, web_search"]}
TURNS, TOOLS = 30, 20


def made(backend: FakeBackend) -> Model:
    return Model(backend, fake_info(n_ctx_train=N_CTX), LoadOptions(n_ctx=N_CTX))


@pytest.fixture(scope="module")
def server() -> Any:
    model = made(FakeBackend(scripted("hello there")))
    with running(model, names=("demo",), strict=True) as started:
        yield started
    model.close()


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("stream", [True, False])
def test_what_clients_send_is_answered(server: Any, path: Path, stream: bool) -> None:
    """By a strict server too: they send nothing that is not known here."""
    recorded = json.loads(path.read_text())
    answer = server.post(recorded["path"], recorded["body"] | {"stream": stream})
    assert answer.status_code == 200, answer.text
    notes = [*NOTES.get(path.stem, ()), *([IN_WORDS] if recorded["body"].get("tools") else ())]
    assert answer.headers.get("x-mobile-gguf-note", "") == "; ".join(notes)
    assert "hello there" in answer.text.replace('"}', "") or stream
    assert "error" not in answer.text.replace('"error":null', "")


def of_responses(n: int, text: str, before: list[Any], answered: Any) -> list[Any]:
    """The items of the next request: those of the last one, its answer's, and a tool's result."""
    calls = [one for one in answered["output"] if one["type"] == "function_call"] if answered else []
    new: list[Any] = [*answered["output"]] if answered else []
    new += [{"type": "function_call_output", "call_id": one["call_id"], "output": text} for one in calls]
    return [*before, *new, *([] if calls else [{"role": "user", "content": f"Question {n}."}])]


def of_messages(n: int, text: str, before: list[Any], answered: Any) -> list[Any]:
    """The same as Anthropic has it."""
    new: list[Any] = [{"role": "assistant", "content": answered["content"]}] if answered else []
    calls = [one for one in answered["content"] if one["type"] == "tool_use"] if answered else []
    results = [{"type": "tool_result", "tool_use_id": one["id"], "content": text} for one in calls]
    return [*before, *new, {"role": "user", "content": results or f"Question {n}."}]


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_each_turn_of_an_agent_computes_what_is_new(api: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 60}}}
    call = '{"name": "tool7", "arguments": {"a": "b"}}'
    # words, a call, and what comes after it
    model = made(FakeBackend(phases(*("Let me see. <tool_call>\n", call, "") * TURNS)))
    if api == "responses":
        tools = [{"type": "function", "name": f"tool{i}", "parameters": schema} for i in range(TOOLS)]
        extend, key, body = of_responses, "input", {"instructions": "Be brief.", "tools": tools}
    else:
        tools = [{"name": f"tool{i}", "input_schema": schema} for i in range(TOOLS)]
        extend, key = of_messages, "messages"
        body = {"system": "Be brief.", "tools": tools, "max_tokens": 200}
    conversation: list[Any] = []
    answered: Any = None
    with running(model) as server:
        for n in range(TURNS):
            result = f"result {n} " * 9
            conversation = extend(n, result, conversation, answered)
            answered = server.post(f"/v1/{api}", body | {key: conversation}).json()
            usage = answered["usage"]
            if api == "responses":
                cached = usage["input_tokens_details"]["cached_tokens"]
                new = usage["input_tokens"] - cached
            else:
                cached, new = usage["cache_read_input_tokens"], usage["input_tokens"]
            if n:
                # the answer, its call and the result, in the words of the template
                assert new < 400, (n, usage)
                assert cached > 2000
    model.close()
