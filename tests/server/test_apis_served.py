"""Other APIs over the scripted engine: their own Python clients, errors in their form, keys, lines, notes."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import hostile
import httpx
import pytest
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
openai = pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
anthropic = pytest.importorskip("anthropic", reason="pip install 'mobile-gguf[dev]'")
from server_harness import SECONDS, Gate, get, phases, running, until  # noqa: E402

from mobile_gguf.api.model import Model  # noqa: E402
from mobile_gguf.generate.prompts.gap import FillTokens  # noqa: E402
from mobile_gguf.options import LoadOptions  # noqa: E402

ROOMY = fake_info(n_ctx_train=8192)
USER = [{"role": "user", "content": "hi"}]
CALL = '{"name": "add", "arguments": {"a": 1}}'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "name": "add", "parameters": SCHEMA}
ANTHROPIC_ADD = {"name": "add", "input_schema": SCHEMA}
SAYS = {"role": "user", "content": "add"}


def made(backend: FakeBackend) -> Model:
    return Model(backend, ROOMY, LoadOptions())


def claude(server: Any, key: str = "none") -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="module")
def hello() -> Any:
    model = made(FakeBackend(scripted("hello there")))
    with running(model, names=("fake", "other", "/a/path.gguf"), pooling="mean") as server:
        yield server
    model.close()


@pytest.fixture
def caller() -> Any:
    model = made(FakeBackend(phases("Yes. <tool_call>\n", CALL, "\n", "")))
    with running(model) as server:
        yield server
    model.close()


# Responses


def test_openais_client_gets_a_response_whole_and_streamed(hello: Any) -> None:
    client = hello.openai()
    whole = client.responses.create(model="fake", input="hi", instructions="Be brief.")
    assert (whole.output_text, whole.status) == ("hello there", "completed")
    assert whole.usage.output_tokens == 12
    assert whole.usage.receipt["tokens_big"] == 12
    with client.responses.stream(model="fake", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "hello there"
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    cut = client.responses.create(model="fake", input="hi", max_output_tokens=5)
    assert (cut.output_text, cut.status, cut.incomplete_details.reason) == (
        "hello", "incomplete", "max_output_tokens",
    )  # fmt: skip


def test_a_response_is_gone_on_with_by_its_id_unless_it_is_not_stored() -> None:
    backend = FakeBackend(scripted("hello there"))
    model = made(backend)
    with running(model) as server:
        client = server.openai()
        first = client.responses.create(model="fake", input="one", instructions="Old.")
        client.responses.create(model="fake", input="two", previous_response_id=first.id)
        said = bytes(token for token, _ in backend.rows if token < 256).decode()
        assert said.startswith("<user>one\n<assistant>hello there\n<user>two\n")
        assert client.responses.retrieve(first.id).output_text == "hello there"
        assert client.responses.input_items.list(first.id).data[0].content == "one"
        client.responses.delete(first.id)
        unkept = client.responses.create(model="fake", input="x", store=False)
        for id in (first.id, unkept.id):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(id)
            with pytest.raises(openai.BadRequestError, match="send the whole conversation") as raised:
                client.responses.create(model="fake", input="two", previous_response_id=id)
            assert raised.value.code == "previous_response_not_found"
    model.close()


def test_a_tool_is_called_by_openais_client(caller: Any) -> None:
    with caller.openai().responses.stream(
        model="fake", input="add", tools=[ADD, {"type": "web_search"}], parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_response()
    message, call = final.output
    assert message.content[0].text == "Yes."
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 1})
    assert "web_search" in final.usage.notes[0]


def test_tokens_of_items_are_counted(hello: Any) -> None:
    n = hello.post("/v1/responses/input_tokens", {"input": "hi"}).json()["input_tokens"]
    assert n == hello.post("/v1/responses", {"input": "hi"}).json()["usage"]["input_tokens"]


# Messages


def test_anthropics_client_gets_a_message_whole_and_streamed(hello: Any) -> None:
    client = claude(hello)
    whole = client.messages.create(model="fake", max_tokens=50, messages=USER, system="Be brief.")
    assert (whole.content[0].text, whole.stop_reason) == ("hello there", "end_turn")
    usage = whole.usage
    assert usage.receipt["tokens_big"] == 12
    n = client.messages.count_tokens(model="fake", messages=USER, system="Be brief.").input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == n
    with client.messages.stream(model="fake", max_tokens=5, messages=USER) as stream:
        assert "".join(stream.text_stream) == "hello"
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 5)


def test_a_tool_is_called_by_anthropics_client(caller: Any) -> None:
    client = claude(caller)
    with client.messages.stream(
        model="fake", max_tokens=200, messages=[SAYS], tools=[ANTHROPIC_ADD]
    ) as stream:
        final = stream.get_final_message()
    words, call = final.content
    assert final.stop_reason == "tool_use"
    assert words.text == "Yes."
    assert (call.name, call.input) == ("add", {"a": 1})
    told = [SAYS, {"role": "assistant", "content": final.content}]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
    again = client.messages.create(
        model="fake",
        max_tokens=50,
        messages=[*told, {"role": "user", "content": [result]}],
        tools=[ANTHROPIC_ADD],
    )
    assert again.stop_reason in ("end_turn", "tool_use")


def test_errors_have_the_form_of_their_api(hello: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="this server has fake"):
        claude(hello).messages.create(model="claude-x", max_tokens=5, messages=USER)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude(hello).messages.create(
            model="fake", max_tokens=5, messages=[{"role": "user", "content": "x" * 9000}]
        )
    for body in ({}, {"messages": []}, {"messages": USER, "max_tokens": 0}, [], "{"):
        error = hello.post("/v1/messages", body).json()
        assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
        assert error["error"]["message"].isprintable()
        assert hello.post("/v1/responses", body if body != {} else {"input": 5}).json()["error"]["message"]
    assert get(f"{hello.url}/v1/messages").json()["error"]["type"] == "invalid_request_error"
    assert get(f"{hello.url}/api/none").json() == {"error": "Not Found: GET /api/none"}
    assert isinstance(hello.post("/api/chat", {"messages": 5}).json()["error"], str)


def test_both_ways_to_send_a_key() -> None:
    model = made(FakeBackend(scripted("ok")))
    with running(model, api_key="secret") as server:
        assert claude(server, "secret").messages.create(model="fake", max_tokens=5, messages=USER).content
        with pytest.raises(anthropic.AuthenticationError, match="wrong"):
            claude(server, "other").messages.create(model="fake", max_tokens=5, messages=USER)
        bearer = anthropic.Anthropic(base_url=server.url, auth_token="secret", api_key=None, max_retries=0)
        assert bearer.messages.create(model="fake", max_tokens=5, messages=USER).content
        url = f"{server.url}/v1/models"
        for headers, status in (
            ({}, 401), ({"x-api-key": "secret"}, 200), ({"authorization": "Basic secret"}, 401),
            ({"authorization": "Basic x", "x-api-key": "secret"}, 200), ({"x-api-key": ""}, 401),
            ({"authorization": "Bearer no", "x-api-key": "secret"}, 401),
        ):  # fmt: skip
            assert get(url, headers=headers).status_code == status, headers
        refused = get(f"{server.url}/v1/messages/count_tokens")
        assert refused.json()["error"]["type"] == "authentication_error"
        assert get(f"{server.url}/api/tags").json().keys() == {"error"}
    model.close()


def test_a_failure_in_a_stream_is_the_last_event_of_each_api() -> None:
    for path, body, last in (
        ("/v1/responses", {"input": "hi"}, "event: response.failed"),
        ("/v1/messages", {"messages": USER, "max_tokens": 50}, "event: error"),
        ("/api/chat", {"messages": USER}, '{"error":'),
        ("/completion", {"prompt": "hi"}, 'data: {"error":'),
    ):
        backend = FakeBackend(scripted("hello there"))
        backend.errors[5] = RuntimeError("boom")
        model = made(backend)
        with running(model) as server:
            text = server.post(path, body | {"stream": True}).text.strip()
            assert text.splitlines()[-2 if text.count("event:") else -1].startswith(last), (path, text)
            backend.errors[backend.n_evaluations + 5] = RuntimeError("boom")
            whole = server.post(path, body | {"stream": False})
            assert whole.status_code == 500
            assert "hello"[:2] in json.dumps(whole.json()), whole.text  # what was said before is not lost
        model.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": USER, "max_tokens": 1 << 19}),
        ("/api/chat", {"messages": USER}),
        ("/completion", {"prompt": "hi"}),
    ],
)
def test_who_hangs_up_stops_the_answer(path: str, body: dict[str, Any]) -> None:
    gate = Gate()
    backend = FakeBackend(scripted("hello there", end=False), n_ctx=1 << 20)
    backend.on_evaluate = gate
    model = made(backend)
    model.n_ctx = 1 << 20  # the answer lasts until it is cut
    with running(model) as server:
        gate.allow(4)
        for stream in (True, False):
            gate.reached.clear()
            client = httpx.Client(timeout=SECONDS)
            if stream:
                with client.stream("POST", server.url + path, json=body | {"stream": True}) as answer:
                    next(answer.iter_raw())
            else:
                short = httpx.Timeout(SECONDS, read=0.5)
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(server.url + path, json=body | {"stream": False}, timeout=short)
            client.close()
            until(lambda: gate.step() or not server.serving.worker.is_busy)
        until(lambda: server.serving.metrics.cancelled._value.get() == 2)
    model.close()


# what there is


def test_paths_without_a_version_are_the_same(hello: Any) -> None:
    for path, body in (
        ("/chat/completions", {"messages": USER}),
        ("/completions", {"prompt": "x"}),
        ("/responses", {"input": "x"}),
        ("/messages", {"messages": USER, "max_tokens": 5}),
        ("/embeddings", {"input": "x"}),
    ):
        assert hello.post(path, body).json().keys() == hello.post(f"/v1{path}", body).json().keys(), path
    for path in ("/models", "/models/other", "/v1/health"):
        assert get(hello.url + path).status_code == 200
    assert get(f"{hello.url}/models").json()["data"][1]["id"] == "other"


def test_a_model_for_clients_of_all_kinds(hello: Any) -> None:
    card = claude(hello).models.list().data[0]
    assert (card.id, card.type, card.display_name) == ("fake", "model", "Fake MoE")
    listed = get(f"{hello.url}/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["fake", "other"]
    assert {one["context_length"] for one in listed["data"]} == {4096}
    assert (listed["has_more"], listed["last_id"]) == (False, "other")


def test_ollamas_questions(hello: Any) -> None:
    def lines(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        answer = hello.post(path, body)
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]

    told = lines("/api/chat", {"model": "fake:latest", "messages": USER})
    assert "".join(one["message"]["content"] for one in told) == "hello there"
    assert (told[-1]["done"], told[-1]["eval_count"]) == (True, 12)
    told = lines("/api/generate", {"prompt": "x", "options": {"num_predict": 5}})
    assert ("".join(one["response"] for one in told), told[-1]["done_reason"]) == ("hello", "length")
    whole = hello.post("/api/generate", {"prompt": "x", "raw": True, "stream": False}).json()
    assert (whole["response"], whole["prompt_eval_count"]) == ("hello there", 2)
    assert hello.post("/api/chat", {"messages": []}).json()["done_reason"] == "load"
    tags = get(f"{hello.url}/api/tags").json()["models"]
    assert [one["name"] for one in tags] == ["fake", "other"]
    assert get(f"{hello.url}/api/ps").json()["models"][0]["context_length"] == 4096
    assert get(f"{hello.url}/api/version").json()["version"].count(".") == 2
    shown = hello.post("/api/show", {"model": "other"}).json()
    assert shown["model_info"]["fakemoe.context_length"] == 4096
    assert {"completion", "tools", "embedding"} <= set(shown["capabilities"])
    assert "insert" not in shown["capabilities"]
    vectors = hello.post("/api/embed", {"input": ["a", "b"], "dimensions": 2}).json()["embeddings"]
    assert [len(one) for one in vectors] == [2, 2]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1)


def test_llama_servers_questions(hello: Any) -> None:
    tokens = hello.post("/tokenize", {"content": "hé", "add_special": True}).json()["tokens"]
    assert tokens == [256, *"hé".encode()]
    pieces = hello.post("/tokenize", {"content": "é", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]
    assert hello.post("/detokenize", {"tokens": tokens}).json() == {"content": "hé"}
    assert hello.post("/detokenize", {"tokens": []}).json() == {"content": ""}
    assert hello.post("/detokenize", {"tokens": [999]}).status_code == 400
    prompt = hello.post("/apply-template", {"messages": USER}).json()["prompt"]
    assert prompt == "<user>hi\n<assistant>"
    props = get(f"{hello.url}/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 4096
    assert props["model_path"] == "fake.gguf"
    whole = hello.post("/completion", {"prompt": "x", "n_predict": 5}).json()
    assert (whole["content"], whole["stop_type"], whole["tokens_evaluated"]) == ("hello", "limit", 2)
    refused = hello.post("/infill", {"input_prefix": "a", "input_suffix": "b"})
    assert refused.status_code == 400
    assert "was not made to fill gaps" in refused.json()["error"]["message"]
    refused = hello.post("/v1/completions", {"prompt": "a", "suffix": "b"})
    assert "was not made to fill gaps" in refused.json()["error"]["message"]
    for path in ("/v1/rerank", "/rerank"):
        refused = hello.post(path, {"query": "x", "documents": ["y"]})
        assert "is no reranker" in refused.json()["error"]["message"]
    assert "no slots" in get(f"{hello.url}/slots").json()["error"]["message"]


def test_a_gap_is_filled_by_the_models_tokens() -> None:
    backend = FakeBackend(scripted("middle"))
    backend.fill_tokens = FillTokens(1, 2, 3)
    model = made(backend)
    with running(model) as server:
        extra = [{"filename": "a.py", "text": "x"}]
        body = {
            "input_prefix": "be",
            "input_suffix": "af",
            "prompt": "m",
            "input_extra": extra,
            "n_indent": 2,
        }
        answer = server.post("/infill", body)
        assert answer.json()["content"] == "middle"
        assert "x-mobile-gguf-note" not in answer.headers
        prompt = [token for token, _ in backend.rows][: -len("middle")]
        assert prompt == [256, 1, *b"a.py\nx\nbe", 2, *b"af", 3, *b"m"]
        whole = server.post("/api/generate", {"prompt": "be", "suffix": "af", "stream": False}).json()
        assert whole["response"] == "middle"
        assert get(f"{server.url}/props").json()["fills_gaps"] is True
        body = {"prompt": ["be", "ba"], "suffix": "af", "temperature": 0}
        choices = server.post("/v1/completions", body).json()["choices"]
        assert [choice["text"] for choice in choices] == ["middle", "middle"]
        assert [token for token, _ in backend.rows][:7] == [256, 1, *b"ba", 2, *b"af"]
        for more in ({"echo": True}, {"logprobs": 1}, {"prompt": [1, 2]}, {"prompt": [[1], [2]]}):
            refused = server.post("/v1/completions", body | more)
            assert refused.status_code == 400
            assert "suffix" in refused.json()["error"]["message"]
    model.close()


def test_documents_are_ranked() -> None:
    """The scripted engine's score is the length of a pair."""
    backend = FakeBackend(pooling="rank", can_generate=False)
    model = made(backend)
    with running(model) as server:
        body = {"query": "q", "documents": ["a", "abc", {"text": "ab"}], "top_n": 2, "return_documents": True}
        ranked = server.post("/v1/rerank", body).json()
        assert [one["index"] for one in ranked["results"]] == [1, 2]
        assert ranked["results"][0]["document"] == {"text": "abc"}
        assert ranked["results"][0]["relevance_score"] == 7
        assert ranked["usage"]["prompt_tokens"] == 5 + 7 + 6
        for wrong in ({"documents": []}, {}, {"documents": [5]}, {"documents": ["x" * 600]}):
            assert server.post("/v1/rerank", {"query": "q", **wrong}).status_code == 400
    model.close()


def test_hostile_bodies_are_answered_in_every_api(hello: Any) -> None:
    """Tries of the torture run, which has them all against the real engine; each path is tried."""
    rng = random.Random(7)
    outcomes = {path: Counter[str]() for path in hostile.OTHERS}
    asked = hostile.sent

    def counted(url: str, body: Any, path: str = hostile.CHAT, **options: Any) -> str:
        outcome = asked(url, body, path, **options)
        outcomes[path][outcome] += 1
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostile, "sent", counted)
        for _ in range(200):
            hostile.ask_other_apis(rng, hello.url)
    assert all(outcomes.values())
    answered = {path for path, found in outcomes.items() if found["200"]}
    never = {path for path in outcomes if path.startswith(("/slots", "/infill", "/v1/rerank"))}
    assert answered == outcomes.keys() - never
    assert hello.chat().status_code == 200
