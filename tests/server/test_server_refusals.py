"""What the server refuses, and how it says so: OpenAI's errors, bodies, hosts, keys."""

import json

import httpx
import pytest
from fake_backend import FakeBackend, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
import openai
from server_harness import SECONDS, get, post, running

USER = [{"role": "user", "content": "hi"}]


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


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "user"}, "messages.0", "content is missing from the user's message"),
        ({"role": "system", "content": None}, "messages.0", "content is missing"),
        ({"role": "user", "content": 5}, "messages.0.content", "valid string"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.0.content.0.type",
            "text only",
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


@pytest.mark.parametrize(
    "body", [b"[" * 99_000, b'{"a":' * 9000 + b"1" + b"}" * 9000, b'{"max_tokens": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_python_cannot_read(hello, body):
    answer = post(
        f"{hello.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert "cannot be read: it is nested too deeply, or holds a number" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"functions": [{"name": "f"}]}, "give tools"),
        ({"function_call": {"name": "f"}}, "give tool_choice"),
        ({"audio": {"voice": "x"}}, "answers with text only"),
        ({"modalities": ["text", "audio"]}, "answers with text only"),
        ({"tool_choice": 5}, "'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    ],
)
def test_what_is_not_done_here_is_said_in_words(hello, body, words):
    answer = hello.chat(**body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_cors_only_when_asked(fake_model):
    with running(fake_model(), origins=("https://app.example",), api_key="k") as server:
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=asked, timeout=SECONDS)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
