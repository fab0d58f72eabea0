"""A chat's model behind a server: what is asked, what is made of the answer, and what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai_stub import SECONDS, OpenAiStub, serving

from mobile_gguf.api.messages import as_answer
from mobile_gguf.engine.structs import LOADING, NOT_RESIDENT, RESIDENT
from mobile_gguf.errors import MobileError, ModelNotFoundError, UsageError
from mobile_gguf.generate.answer.answer import INTERRUPTED
from mobile_gguf.generate.answer.receipt import Loss, Receipt, Speculation
from mobile_gguf.remote.connection import Server, data_of
from mobile_gguf.remote.model import attach, receipt_of

MESSAGES = [{"role": "user", "content": "hi"}]
OURS = {"id": "demo", "owned_by": "mobile-gguf", "meta": {"name": "Demo", "mode": "little", "n_ctx": 512}}
MAP = {
    "n_layer": 3,
    "n_expert": 4,
    "layers": [1, 2],
    "states": {"absent": "0", "loading": "1", "resident": "2", "hit": "3", "missed": "4"},
    "tiers": {"host": ["0123", "4000"]},
    "n_tokens": 7,
}


@pytest.fixture
def stub() -> Iterator[OpenAiStub]:
    with serving(OpenAiStub()) as made:
        yield made


def test_any_server_answers_with_what_it_takes(stub: OpenAiStub) -> None:
    stub.usage = [{}, {"prompt_tokens": 5, "completion_tokens": 9}]
    with attach(Server(stub.url), None) as model:
        chunks = list(model.stream_chat(MESSAGES, temperature=0.5, top_k=3, stop=("x",), mode="little"))
    assert "".join(chunk.text for chunk in chunks) == "Blue light."
    last = chunks[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("stop", 5, 9)
    assert last.receipt.summary(2.0) == "9 tokens | 2.0 tok/s"
    assert stub.bodies == [
        {
            "model": "m",
            "messages": MESSAGES,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "stop": ["x"],
        }
    ]
    assert not model.experts().has_store
    assert model.experts().places() is None
    with pytest.raises(UsageError, match="no mobile-gguf server: it has no mode"):
        model.configure(mode="little")


def test_a_server_of_ours_gives_receipts_and_its_map(stub: OpenAiStub) -> None:
    receipt = Receipt(
        mode="little", tokens_big=1, loss=Loss(missing=3), speculation=Speculation("ngram", 4, 2)
    )
    said = receipt.to_dict() | {"of_a_later_version": 1}
    stub.models, stub.experts = [OURS, {**OURS, "id": "alias"}], MAP
    stub.usage = [
        {"prompt_tokens": 5, "completion_tokens": n, "tokens_per_second": 4.5, "receipt": said}
        for n in (1, 2)
    ]
    with attach(Server(stub.url), None) as model:
        assert (model.name, model.id, model.mode, model.n_ctx) == ("Demo", "demo", "little", 512)
        model.configure(mode="big-little")
        places = model.experts().places()
        assert places is not None
        assert places.host.tolist() == [
            [NOT_RESIDENT, LOADING, RESIDENT, RESIDENT],
            [RESIDENT, NOT_RESIDENT, NOT_RESIDENT, NOT_RESIDENT],
        ]
        asked = model.experts().taken()
        assert asked is not None
        assert list(zip(asked.rows, asked.experts, asked.missed, strict=True)) == [
            (0, 3, False),
            (1, 0, True),
        ]
        assert np.all(asked.steps == 7)
        chunks = list(model.stream_chat(MESSAGES, top_k=3))
    assert stub.bodies[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (stub.bodies[0]["top_k"], stub.bodies[0]["mode"]) == (3, "big-little")
    assert [chunk.receipt for chunk in chunks] == [receipt] * 3
    assert chunks[-1].tokens_per_second == 4.5
    assert receipt_of(receipt.to_dict()) == receipt


def test_the_map_is_followed_while_somebody_looks(stub: OpenAiStub) -> None:
    stub.models, stub.experts = [OURS], MAP
    heard = threading.Event()
    with attach(Server(stub.url), None) as model:
        experts = model.experts()
        experts.taken()
        take, experts.take = experts.take, lambda picture: (take(picture), heard.set())  # type: ignore[method-assign,assignment]
        watch = experts.watch()
        assert heard.wait(SECONDS)
        asked = watch.take()
        watch.close()
    assert asked is not None
    assert len(asked) == 2


@pytest.mark.parametrize("waits", ["for words", "for the first word"])
def test_an_answer_that_is_stopped_ends_at_once_and_the_server_hears_of_it(
    stub: OpenAiStub, waits: str
) -> None:
    stub.hangs = True
    stub.words = [] if waits == "for the first word" else ["a"]
    stop = threading.Event()

    def should_stop() -> bool:
        return stop.is_set() and bool(stub.bodies)  # who was never asked has nothing to hear of

    with attach(Server(stub.url), None) as model:
        answer = model.stream_chat(MESSAGES, should_stop=should_stop)
        if stub.words:
            assert next(answer).text == "a"
        stop.set()
        (last,) = answer
    assert last.finish_reason == INTERRUPTED
    assert stub.left.wait(SECONDS)


def test_an_answer_that_is_left_closes_its_connection(stub: OpenAiStub) -> None:
    stub.hangs = True
    with attach(Server(stub.url), None) as model:
        answer = model.stream_chat(MESSAGES)
        next(answer)
        answer.close()
    assert stub.left.wait(SECONDS)


def test_a_server_that_does_not_stream_and_one_that_thinks(stub: OpenAiStub) -> None:
    stub.streams = False
    with attach(Server(f"{stub.url}/v1/"), "m") as model:
        assert "".join(chunk.text for chunk in model.stream_chat(MESSAGES)) == "Blue light."
        stub.streams = True
        stub.deltas = [{"reasoning_content": "so"}, {"reasoning_content": "."}, {"content": "Yes"}]
        said = list(model.stream_chat(MESSAGES))
        assert "".join(chunk.text for chunk in said) == "Yes"
        assert "".join(chunk.reasoning for chunk in said) == "so."
        assert sum(bool(chunk.reasoning) for chunk in said) == 2
        # what a strange server thought is not told to it again, it may refuse that
        list(model.stream_chat([*MESSAGES, as_answer("Yes", "so."), *MESSAGES]))
        assert stub.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Yes"}
        stub.models, stub.experts = [OURS], MAP
    with attach(Server(stub.url), None) as model:
        list(model.stream_chat([*MESSAGES, as_answer("Yes", "so."), *MESSAGES]))
        assert stub.bodies[-1]["messages"][1]["reasoning_content"] == "so."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fails": "no\nmemory"}, "no memory"),
        ({"finish": None}, "broke off before the answer was at its end"),
        ({"status": 429}, "answers 429: the queue is full"),
        ({"key": "k"}, "answers 401: no key, or a wrong one: give its key by --api-key-file FILE"),
        ({"raw": b"<html>"}, "sent what is no JSON"),
        ({"raw": b"[]"}, "does not list models as OpenAI's API does"),
        ({"raw": b"[" * 100_000}, "sent what is no JSON"),
        ({"models": []}, "has no model"),
        ({"models": [{"id": "a"}, {"id": "b"}]}, "has several models, give one by --model: a, b"),
    ],
)
def test_what_goes_wrong_is_one_line(stub: OpenAiStub, change: dict[str, Any], said: str) -> None:
    vars(stub).update(change)
    with pytest.raises(MobileError) as raised:
        list(attach(Server(stub.url), None).stream_chat(MESSAGES))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_name_that_is_not_there_and_a_server_that_is_not(stub: OpenAiStub) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no model x: it has m"):
        attach(Server(stub.url), "x")
    with pytest.raises(MobileError, match=r"127\.0\.0\.1:9 cannot be reached: Connection refused"):
        attach(Server("127.0.0.1:9"), None)
    with pytest.raises(MobileError, match=r"404: nothing is here: is it a server with OpenAI's API\?"):
        attach(Server(f"{stub.url}/elsewhere"), None)
    stub.status = 404  # of a question it may be the model that is gone
    with pytest.raises(MobileError, match=r"answers 404: the queue is full$"):
        list(attach(Server(stub.url), None).stream_chat(MESSAGES))
    stub.key = "k"
    assert attach(Server(stub.url, "k"), None).id == "m"
    assert stub.keys[-1] == "Bearer k"


@pytest.mark.parametrize(
    ("url", "api"),
    [
        ("localhost:8080", "http://localhost:8080/v1"),
        ("http://h", "http://h:80/v1"),
        ("https://h/v1/", "https://h:443/v1"),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai:443/api/v1"),
        ("http://[::1]:80", "http://::1:80/v1"),
    ],
)
def test_an_address_may_be_short(url: str, api: str) -> None:
    server = Server(url)
    assert f"{server.scheme}://{server.host}:{server.port}{server.api}" == api


@pytest.mark.parametrize(
    "url", ["", "ftp://h", "http://", "http://h:x", "http://h?a=b", "http://u:p@h", "http://["]
)
def test_what_is_no_address_is_a_line(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        Server(url)
    assert "address" in str(raised.value)


def test_events_may_have_several_lines_and_comments() -> None:
    lines = [
        b": x\n",
        b"data: a\n",
        b"data:b\r\n",
        b"\r\n",
        b"event: y\n",
        b"\n",
        b"data: [DONE]\n",
        b"\n",
        b"data: c\n",
    ]
    assert list(data_of(lines)) == ["a\nb"]
