"""The server over the scripted engine: OpenAI's shapes, the queue, errors, keys, an orderly end."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_backend import BOS, FakeBackend, fake_info, hashed_logits, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
import openai
from server_harness import SECONDS, Gate, get, phases, post, running, until

from mobile_gguf.errors import ExpertReadError
from mobile_gguf.generate.decode import ALL_EXPERTS
from mobile_gguf.server.requests import ChatRequest
from mobile_gguf.server.tools import template_messages

ROOMY = fake_info(n_ctx_train=4096)
USER = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


@pytest.fixture
def hello(fake_model):
    with running(fake_model(FakeBackend(scripted("hello there")))) as server:
        yield server


def test_openai_client_gets_the_same_whole_and_streamed(hello):
    client = hello.openai()
    whole = client.chat.completions.create(model="fake", messages=USER)
    assert whole.choices[0].message.content == "hello there"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.receipt["tokens_big"] == 12
    stream = client.chat.completions.create(
        model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello there"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.receipt["tokens_big"] == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_usage_so_far_in_every_chunk_and_the_place_in_line(hello):
    options = {"include_usage": True, "continuous_usage_stats": True}
    ask = {"model": "fake", "messages": USER, "stream": True, "n": 2}
    chunks = list(hello.openai().chat.completions.create(**ask, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert set(counts) == set(range(1, 25))
    assert [chunk.usage.receipt["tokens_big"] for chunk in chunks] == counts
    places = [hello.chat().json()["usage"]["queue"] for _ in range(2)]
    assert [(place["number"], place["turn"]) for place in places] == [(2, 2), (3, 3)]
    plain = hello.openai().chat.completions.create(**ask)
    assert {chunk.usage for chunk in plain} == {None}


def test_text_completions_with_several_prompts_and_echo(hello):
    answer = hello.openai().completions.create(
        model="fake", prompt=["ab", "cd"], n=2, echo=True, max_tokens=5
    )
    assert [choice.text for choice in answer.choices] == ["abhello", "abhello", "cdhello", "cdhello"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


def test_log_probabilities_of_a_prompt(fake_model):
    """As OpenAI's legacy API has them, and evaluation harnesses ask for them."""
    with running(fake_model(FakeBackend())) as server:
        client = server.openai()
        ask = {
            "model": "fake",
            "prompt": [[BOS, *"aé".encode()], [98, 99, 100]],
            "echo": True,
            "logprobs": 2,
            "seed": 1,
        }
        only = client.completions.create(**ask, max_tokens=0)
        more = client.completions.create(**ask, max_tokens=2, n=2)
        streamed = list(client.completions.create(**ask, max_tokens=2, n=2, stream=True))
        without = client.completions.create(model="fake", prompt="ab", logprobs=2, max_tokens=0)
        again = client.completions.create(**ask, max_tokens=0)
    first, second = (choice.logprobs for choice in only.choices)
    assert [choice.text for choice in only.choices] == ["aé", "bcd"]
    assert [choice.finish_reason for choice in only.choices] == ["length", "length"]
    assert second.tokens == ["b", "c", "d"]
    assert second.text_offset == [0, 1, 2]
    assert first.text_offset == [0, 0, 1, 1]  # the beginning of text, a, and é in two tokens
    for told in first, second:
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        assert all(value < 0 for value in told.token_logprobs[1:])
        assert [len(top) for top in told.top_logprobs[1:]] == [2] * (len(told.tokens) - 1)
    logits = hashed_logits([(98, ALL_EXPERTS), (99, ALL_EXPERTS)])
    assert second.token_logprobs[2] == pytest.approx(logits[100] - np.log(np.exp(logits).sum()))
    assert again.choices[1].logprobs == second  # nothing of it is left out because it is in the context
    assert only.usage.completion_tokens == 0
    assert only.usage.receipt["bytes_read"] == 1024 * (4 + 3)
    assert [len(choice.logprobs.tokens) for choice in more.choices] == [6, 6, 5, 5]
    assert more.choices[2].logprobs.tokens[:3] == second.tokens
    assert more.choices[2].logprobs.token_logprobs[:3] == second.token_logprobs
    for choice in more.choices:
        mine = [chunk.choices[0] for chunk in streamed if chunk.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        told = [one.logprobs for one in mine if one.logprobs]
        for name in "text_offset", "token_logprobs":
            assert [value for one in told for value in getattr(one, name)] == getattr(choice.logprobs, name)
    assert without.choices[0].logprobs.tokens == []


def test_options_reach_the_engine_and_flags_are_defaults(fake_model):
    backend = FakeBackend(scripted("hello there"))
    with running(fake_model(backend), defaults={"temperature": 0.5, "top_k": 7}) as server:
        answer = server.chat(top_k=3, seed=11, mode="little", stop=["the"]).json()
    assert (backend.sampling["temp"], backend.sampling["top_k"], backend.seed) == (0.5, 3, 11)
    assert answer["choices"][0]["message"]["content"] == "hello "
    assert answer["usage"]["receipt"]["mode"] == "little"


def test_logprobs_in_both_forms(hello):
    client = hello.openai()
    chat = client.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "hello there"
    assert content[0].logprob == pytest.approx(-0.01005, abs=1e-4)
    assert content[0].top_logprobs[0].token == "h"
    text = client.completions.create(model="fake", prompt="x", logprobs=1).choices[0].logprobs
    assert text.text_offset[:3] == [0, 1, 2]
    assert text.top_logprobs[0].keys() == {"h"}


def test_a_forced_tool_is_called(fake_model):
    backend = FakeBackend(phases('{"name": "add", "arguments": {"a": 1, "s": "}\\""}}'))
    with running(fake_model(backend, info=ROOMY)) as server:
        answer = server.openai().chat.completions.create(
            model="fake",
            messages=USER,
            tools=[ADD],
            tool_choice={"type": "function", "function": {"name": "add"}},
        )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1, "s": '}"'}


CALL = '{"name": "add", "arguments": {"a": 2}}'
# free words (with half a marker), a call, whether another follows, that, the end
TALK = ("I <tool see<tool_call>\n", CALL, "\n<tool_call>", CALL.replace("2", "3"), "")


def test_a_model_that_talks_and_calls_twice_streamed(fake_model):
    with running(fake_model(FakeBackend(phases(*TALK)), info=ROOMY)) as server:
        stream = server.openai().chat.completions.create(
            model="fake", messages=USER, tools=[ADD], stream=True, temperature=0
        )
        text, calls, reasons = "", {}, []
        for chunk in stream:
            choice = chunk.choices[0]
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or []:
                seen = calls.setdefault(
                    call.index, {"name": call.function.name, "id": call.id, "arguments": ""}
                )
                seen["arguments"] += call.function.arguments
    assert text == "I <tool see"
    assert [json.loads(call["arguments"]) for call in calls.values()] == [{"a": 2}, {"a": 3}]
    assert {call["name"] for call in calls.values()} == {"add"}
    assert len({call["id"] for call in calls.values()}) == 2
    assert reasons == ["tool_calls"]


def test_tools_that_are_not_called_leave_an_ordinary_answer(fake_model):
    backend = FakeBackend(phases("just words <b>"))
    with running(fake_model(backend, info=ROOMY)) as server:
        message = server.chat(tools=[ADD]).json()["choices"][0]
        assert (message["message"]["content"], message["finish_reason"]) == ("just words <b>", "stop")


def test_answers_of_tools_and_earlier_calls_reach_the_prompt(fake_model):
    backend = FakeBackend(phases("done"))
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    with running(fake_model(backend, info=ROOMY)) as server:
        answer = server.post("/v1/chat/completions", {"messages": messages, "tools": [ADD]})
        assert answer.status_code == 200
    prompt = bytes(token for token, _ in backend.rows if token < 256).decode()
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "<tool_response>\n42\n</tool_response>" in prompt
    assert "You may call functions" in prompt


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": USER, "temperature": -1}, 400, "temperature"),
        ({"messages": USER, "temperature": "hot"}, 400, "temperature"),
        ({"messages": USER, "mode": "huge"}, 400, "mode"),
        ({"messages": USER, "n": 99}, 400, "n"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": USER, "model": "gpt-5"}, 404, "model"),
        ({"messages": USER, "tool_choice": "required"}, 400, "tool_choice"),
        ({"messages": USER, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        ({"messages": USER, "json_schema": {"minItems": 10**9}}, 400, "json_schema"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
        ([], 400, None),
    ],
)
def test_errors_have_openais_shape(hello, body, status, param):
    answer = post(f"{hello.url}/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"NaN"])
def test_a_body_that_is_no_json_is_a_400(hello, content):
    answer = post(f"{hello.url}/v1/chat/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_paths_and_methods(hello):
    assert get(f"{hello.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert get(f"{hello.url}/v1/completions").status_code == 405


def test_a_request_that_is_too_large_or_a_strange_host_is_refused(fake_model):
    with running(fake_model(), max_request_bytes=1000, hosts=("127.0.0.1",)) as server:
        assert server.chat("x" * 1000).status_code == 413
        chunked = post(f"{server.url}/v1/completions", content=iter([b"x" * 600] * 2), headers=JSON)
        assert chunked.status_code == 413
        assert get(f"{server.url}/health", headers={"host": "evil.example"}).status_code == 403
        assert get(f"{server.url}/health").json()["status"] == "ok"


def test_the_key(fake_model):
    with running(fake_model(FakeBackend(scripted("ok"))), api_key="secret") as server:
        assert server.openai("secret").models.list().data[0].id == "fake"
        with pytest.raises(openai.AuthenticationError, match="wrong"):
            server.openai("guess").models.list()
        assert get(f"{server.url}/metrics").status_code == 401
        assert get(f"{server.url}/health").json()["needs_key"] is True
        assert get(server.url).status_code == 200


def test_an_engine_error_is_a_500_and_the_server_lives_on(fake_model):
    backend = FakeBackend(scripted("hello"))
    backend.errors = {0: ExpertReadError("disk gone: layer 3"), 4: ExpertReadError("disk gone again")}
    with running(fake_model(backend)) as server:
        failed = server.chat()
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
        assert "layer 3" in failed.json()["error"]["message"]
        with pytest.raises(openai.APIError, match="disk gone again"):
            list(server.openai().chat.completions.create(model="fake", messages=USER, stream=True))
        assert server.chat().json()["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_answered_before_a_failure_is_not_lost(fake_model, stream):
    backend = FakeBackend(scripted("hello"))
    backend.errors = {3: ExpertReadError("disk gone: layer 3")}
    with running(fake_model(backend)) as server:
        answer = server.chat(stream=stream)
        if stream:
            chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert chunks.pop()["error"]["code"] == "engine_error"
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        else:
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "engine_error"
            (choice,) = answer.json()["choices"]
            text = choice["message"]["content"]
            assert choice["finish_reason"] is None
        assert text == "hel"
        assert "choices" not in server.post("/v1/chat/completions", {"messages": []}).json()


def test_the_queue_is_bounded_and_keeps_its_order(fake_model):
    gate, order = Gate(), []
    backend = FakeBackend(scripted("x"))
    backend.on_evaluate = gate
    model = fake_model(backend)
    render = backend.render_chat

    def note(messages, **values):
        order.append(messages[-1]["content"])
        return render(messages, **values)

    backend.render_chat = note  # type: ignore[method-assign]
    with running(model, queue=3) as server, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.chat, "0")]
        assert gate.reached.wait(SECONDS)
        for i in range(1, 4):
            waiting.append(pool.submit(server.chat, str(i)))
            until(lambda i=i: server.serving.worker.n_waiting == i)
        full = server.chat("one too many")
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        gate.open()
        assert [answer.result().status_code for answer in waiting] == [200] * 4
    assert order == ["0", "1", "2", "3"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model_and_its_place(fake_model, stream):
    gate = Gate()
    backend = FakeBackend(scripted("x", end=False), n_ctx=1 << 20)
    backend.on_evaluate = gate
    model = fake_model(backend)
    model.n_ctx = 1 << 20
    with running(model, queue=2) as server:
        body = {"messages": USER, "stream": stream, "max_tokens": 1 << 19}

        async def leave():
            async with httpx.AsyncClient(timeout=SECONDS) as client:
                asks = [
                    asyncio.ensure_future(client.post(f"{server.url}/v1/chat/completions", json=body))
                    for _ in range(2)
                ]
                while server.serving.worker.n_waiting < 1:
                    await asyncio.sleep(0.01)
                gate.allow(5)
                for ask in asks:
                    ask.cancel()
                await asyncio.gather(*asks, return_exceptions=True)

        asyncio.run(leave())
        until(lambda: server.serving.worker.n_waiting == 0)

        def is_free() -> bool:
            gate.allow(1)  # whether the server has seen by now that nobody listens is its own time
            return not server.serving.worker.is_busy

        until(is_free)
        gate.open()
        assert server.chat(max_tokens=2).status_code == 200
        counted = "mobile_gguf_cancelled_requests_total 2.0"
        until(lambda: counted in get(f"{server.url}/metrics").text)


def test_a_request_may_take_only_so_long(fake_model):
    gate = Gate()
    backend = FakeBackend(scripted("x", end=False))
    backend.on_evaluate = gate
    with running(fake_model(backend), timeout=0.3) as server:
        late = server.chat()
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        gate.open()
        until(lambda: not server.serving.worker.is_busy)


@pytest.mark.parametrize("ends", [True, False])
def test_shutdown_lets_the_running_answer_end_or_cuts_it_cleanly(fake_model, ends):
    gate = Gate()
    backend = FakeBackend(scripted("hello", end=ends), n_ctx=1 << 20)
    model = fake_model(backend)
    model.n_ctx = 1 << 20
    backend.on_evaluate = gate
    with running(model, grace=SECONDS if ends else 0.2) as server:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(lambda: server.chat(stream=True, max_tokens=1 << 19).text)
            assert gate.reached.wait(SECONDS)
            waits = pool.submit(server.chat)
            until(lambda: server.serving.worker.n_waiting == 1)
            gate.allow(2)
            server.server.should_exit = True
            until(lambda: server.serving.worker.n_waiting == 0)
            gate.open()
            text = first.result(timeout=SECONDS)
            assert waits.result(timeout=SECONDS).status_code == 503
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
    assert text.rstrip().endswith("data: [DONE]")
    assert ('"finish_reason":"stop"' in text) == ends
    assert ("the answer was cut: " in text) != ends


def test_metrics_experts_and_the_page(hello):
    hello.chat()
    text = get(f"{hello.url}/metrics").text
    assert 'mobile_gguf_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
    assert 'mobile_gguf_tokens_total{kind="big"} 12.0' in text
    assert "mobile_gguf_queue_length 0.0" in text
    assert get(f"{hello.url}/v1/experts").json()["tiers"] == {}
    page = get(hello.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for part in ("app.js", "markdown.js", "app.css", "icon.svg"):
        assert f"/{part}" in page.text or part == "markdown.js"
        assert get(f"{hello.url}/{part}").status_code == 200
    assert "access-control-allow-origin" not in page.headers


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "user"}, "messages.0", "content is missing from the user's message"),
        ({"role": "system", "content": None}, "messages.0", "content is missing"),
        ({"role": "user", "content": 5}, "messages.0.content", "valid string"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.0.content.0.type",
            "'text'",
        ),
    ],
)
def test_a_message_that_cannot_be_is_told_where(hello, message, param, words):
    answer = hello.post("/v1/chat/completions", {"messages": [message]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_body_that_is_not_utf_8(hello):
    body = b'{"messages": [{"role": "user", "content": "\xff"}]}'
    answer = post(
        f"{hello.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the body is not UTF-8")


def test_every_file_of_the_page_is_there_without_a_key(fake_model):
    files = Path(str(resources.files("mobile_gguf.server") / "page"))
    every = (file.relative_to(files).as_posix() for file in files.rglob("*") if file.is_file())
    names = sorted(name for name in every if not name.endswith((".LICENSE", ".json")))
    assert "vendor/markdown-it.js" in names
    with running(fake_model(), api_key="secret") as server:
        for name in names:
            found = get(f"{server.url}/{name}" if name != "index.html" else server.url)
            assert found.status_code == 200, name
            assert found.content == (files / name).read_bytes()
        assert get(f"{server.url}/v1/models").status_code == 401


def test_cors_only_when_asked(fake_model):
    with running(fake_model(), origins=("https://app.example",), api_key="k") as server:
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=asked, timeout=SECONDS)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_many_threads_get_their_own_answers(fake_model):
    class Echo(FakeBackend):
        def render_chat(self, messages, **values):
            self.model = scripted(messages[-1]["content"])
            return super().render_chat(messages, **values)

    with running(fake_model(Echo())) as server, ThreadPoolExecutor(8) as pool:
        texts = [f"answer {i}" for i in range(24)]
        answers = list(pool.map(lambda text: server.chat(text).json(), texts))
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == texts
    assert threading.active_count() < 50


def test_tools_in_words_and_the_user_take_turns_with_the_assistant():
    """Mistral's templates, for one, refuse two messages of the user's in a row."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    said = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "user", "content": "and?"},
    ]
    made = template_messages(ChatRequest.model_validate({"messages": said}).messages, None, False)
    assert [message["role"] for message in made] == ["user", "assistant", "user"]
    result = "<tool_response>\n{}\n</tool_response>\n"
    assert made[-1]["content"] == result.format(4) + result.format(5) + "and?"
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    asked = ChatRequest.model_validate({"messages": twice}).messages
    assert template_messages(asked, None, False) == twice  # what the user says is the user's to order
