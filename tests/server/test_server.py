"""The server over the scripted engine: OpenAI's shapes, options, probabilities, what else it serves."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from fake_backend import BOS, FakeBackend, hashed_logits, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
from server_harness import get, running

from mobile_gguf.generate.passes.decode import ALL_EXPERTS

USER = [{"role": "user", "content": "hi"}]


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
