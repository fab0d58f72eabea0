"""What a request may say, and what is told of it: fields of OpenAI's, seeds, cached tokens, metrics."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from pydantic import ValidationError
from server_harness import get, phases, post, running

from mobile_gguf.api.model import Model
from mobile_gguf.generate.answer.answer import Chunk
from mobile_gguf.generate.answer.receipt import Receipt, Speculation
from mobile_gguf.generate.request.request import fold_seed
from mobile_gguf.options import LoadOptions
from mobile_gguf.server.failures import ApiError
from mobile_gguf.server.requests import ChatRequest
from mobile_gguf.server.tools import plan_tools, template_messages
from mobile_gguf.server.usage import Spent

ROOMY = fake_info(n_ctx_train=4096)
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


class Noting(FakeBackend):
    """Remembers what a template is given."""

    def render_chat(self, messages: Any, *, special: bool = False, **values: Any) -> list[int]:
        self.given = values | {"special": special}
        return super().render_chat(messages, special=special, **values)


@pytest.fixture
def backend() -> Noting:
    return Noting(scripted("ok"))


@pytest.fixture
def server(fake_model: Any, backend: Noting) -> Any:
    with running(fake_model(backend, info=ROOMY)) as made:
        yield made


@pytest.fixture(scope="module")
def strict() -> Any:
    model = Model(Noting(scripted("ok")), ROOMY, LoadOptions())
    with running(model, strict=True, pooling="mean") as made:
        yield made
    model.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"verbosity": "low", "modalities": ["text"], "prompt_cache_retention": "24h"},
        {"web_search_options": {}, "metadata": {"a": "b"}, "store": True},
        {"prediction": {"type": "content", "content": "x"}, "functions": [], "function_call": "auto"},
        {"id_slot": 0, "timings_per_token": True, "return_progress": True, "special": False},
        dict.fromkeys(
            ("audio", "prediction", "functions", "function_call", "reasoning_effort", "verbosity",
             "modalities", "temperature", "stop", "seed", "n", "tools", "tool_choice", "stream",
             "response_format", "user",
             "logit_bias", "max_tokens", "special", "chat_template_kwargs", "mode", "grammar")
        ),
    ],
)  # fmt: skip
def test_fields_that_change_no_answer_are_taken(server: Any, fields: dict[str, Any]) -> None:
    answer = server.chat(**fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modalities", ["text", "audio"]), ("audio", {"voice": "x"}), ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}), ("reasoning_effort", "huge"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_not(server: Any, name: str, value: Any) -> None:
    answer = server.chat(**{name: value})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["param"]


def test_what_nobody_knows_is_left_out_with_a_note(server: Any) -> None:
    for stream in False, True:
        answer = server.chat(top_kk=1, nonsense=None, chat_id="x", **{"a\nb": 2}, stream=stream)
        assert answer.status_code == 200
        assert answer.headers["x-mobile-gguf-note"] == "not known here and left out: top_kk, a\\nb"
    assert server.chat(**{"": 1}).headers["x-mobile-gguf-note"] == "not known here and left out:"
    assert len(server.chat(**{"x" * 70 + str(i): 1 for i in range(99)}).headers["x-mobile-gguf-note"]) <= 1000
    assert "x-mobile-gguf-note" not in server.chat(nonsense=None, session_id="y").headers
    assert server.chat(top_kk=1).json()["usage"]["notes"] == ["not known here and left out: top_kk"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": USER, "max_tokens": 4}),
        ("/v1/messages/count_tokens", {"messages": USER}),
        ("/v1/embeddings", {"input": "x"}),
        ("/api/chat", {"messages": USER}),
        ("/api/generate", {"prompt": "x"}),
        ("/api/embed", {"input": "x"}),
        ("/api/show", {}),
        ("/tokenize", {"content": "x"}),
        ("/detokenize", {"tokens": [97]}),
        ("/apply-template", {"messages": USER}),
        ("/completion", {"prompt": "x"}),
    ],
)
def test_a_strict_server_refuses_what_nobody_knows(strict: Any, path: str, body: dict[str, Any]) -> None:
    assert strict.post(path, body | {"metadata": None, "nothing": None}).status_code == 200
    refused = strict.post(path, body | {"top_kk": 1})
    assert refused.status_code == 400
    assert "top_kk" in json.dumps(refused.json())


def test_a_budget_of_divergence_is_a_field(server: Any) -> None:
    answer = server.chat(max_kld=0.03, n=2).json()
    receipt = answer["usage"]["receipt"]
    assert receipt["mode"] == "auto"
    assert (receipt["loss"]["budget"], receipt["loss"]["estimate"]) == (0.03, 0)
    assert server.chat(mode="auto").json()["usage"]["receipt"]["loss"]["budget"] == 0.02
    assert server.chat(max_kld=0).json()["usage"]["receipt"]["mode"] == "exact"
    refused = server.chat(max_kld=-1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_kld"


@pytest.mark.parametrize("name", ["\x00", "\x1b[31m", "a\nb", "\ud800"])
def test_an_error_is_a_printable_line(server: Any, strict: Any, name: str) -> None:
    content = json.dumps({"messages": USER, name: 1}).encode()
    answers = [
        post(f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        for url in (strict.url, server.url)
    ]
    error = answers[0].json()["error"]
    is_text = name != "\ud800"
    assert [answer.status_code for answer in answers] == [400, 200 if is_text else 400]
    assert error["message"].isprintable()
    assert error["param"] is None or error["param"].isprintable()
    if is_text:
        assert answers[1].json()["usage"]["notes"][0].isprintable()
        assert answers[1].headers["x-mobile-gguf-note"].isprintable()


def test_completions_take_what_says_nothing(server: Any) -> None:
    body = {"prompt": "x", "suffix": None, "best_of": 1, "prompt_cache_retention": None}
    assert server.post("/v1/completions", body).status_code == 200
    for more in ({"suffix": "end"}, {"best_of": 2}, {"suffix": "end", "echo": True}):
        assert server.post("/v1/completions", body | more).status_code == 400


@pytest.mark.parametrize(
    ("effort", "values"),
    [
        ("none", {"enable_thinking": False}),
        ("minimal", {"enable_thinking": False, "reasoning_effort": "low"}),
        ("low", {"reasoning_effort": "low"}),
        ("xhigh", {"reasoning_effort": "high"}),
        ("max", {"reasoning_effort": "high"}),
    ],
)
def test_the_effort_is_the_templates(
    server: Any, backend: Noting, effort: str, values: dict[str, Any]
) -> None:
    assert server.chat(reasoning_effort=effort).status_code == 200
    assert backend.given == {"special": False} | values
    server.chat(reasoning_effort=effort, chat_template_kwargs={"reasoning_effort": "own"})
    assert backend.given["reasoning_effort"] == "own"


def test_control_tokens_are_read_only_if_asked(server: Any, backend: Noting) -> None:
    server.chat()
    assert backend.given["special"] is False
    server.chat(special=True)
    assert backend.given["special"] is True


def test_every_seed_is_one(server: Any, backend: Noting) -> None:
    for seed, used in {0: 0, 7: 7, 2**32 - 2: 2**32 - 2, 2**32 - 1: 0, 2**32: 1, 2**63 - 1: 1}.items():
        assert fold_seed(seed) == used if seed < 2**63 - 1 else fold_seed(seed) < 2**32 - 1
        assert server.chat(seed=seed).status_code == 200
        assert backend.seed == fold_seed(seed)
        assert backend.seed != 2**32 - 1


def test_several_answers_to_one_prompt_find_it_cached_once(server: Any) -> None:
    first = server.chat(n=3).json()["usage"]
    again = server.chat(n=3).json()["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["prompt_tokens_details"] == {"cached_tokens": again["prompt_tokens"] - 1}
    text = get(f"{server.url}/metrics").text
    n = first["prompt_tokens"]
    assert f'mobile_gguf_tokens_total{{kind="prompt"}} {2.0 * n}' in text
    assert f'mobile_gguf_tokens_total{{kind="cached"}} {n - 1.0}' in text


def test_a_call_of_a_tool_finds_its_prompt_cached_once(fake_model: Any) -> None:
    talk = ("Yes <tool_call>\n", '{"name": "add", "arguments": {}}', "\n<tool_call>", "", "")
    with running(fake_model(FakeBackend(phases(*talk)), info=ROOMY)) as server:
        usage = server.chat(tools=[TOOL]).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_times_are_counted_for_all_kinds_alike(fake_model: Any) -> None:
    with running(fake_model(FakeBackend(scripted("ok")), info=ROOMY), pooling="mean") as server:
        server.chat()
        server.chat(stream=True)
        server.post("/v1/completions", {"prompt": "x"})
        server.post("/v1/embeddings", {"input": "x"})
        text = get(f"{server.url}/metrics").text
    for path, n in (("/v1/chat/completions", 2), ("/v1/completions", 1), ("/v1/embeddings", 1)):
        for name in ("request_seconds", "queue_seconds"):
            assert f'mobile_gguf_{name}_count{{endpoint="{path}"}} {n}.0' in text


def test_the_document_knows_that_health_needs_no_key(fake_model: Any) -> None:
    with running(fake_model(), api_key="k") as server:
        document = get(f"{server.url}/openapi.json", headers={"authorization": "Bearer k"}).json()
    assert document["paths"]["/health"]["get"]["security"] == []
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health"].keys() == {"get"}


def test_whole_numbers_as_other_languages_write_them(server: Any, backend: Noting) -> None:
    assert server.chat(max_tokens=-1, top_k=-1).json()["choices"][0]["finish_reason"] == "stop"
    assert server.chat(max_completion_tokens=-1, n=1.0).status_code == 200
    assert server.chat(max_tokens=1.0).json()["usage"]["completion_tokens"] == 1
    for body in ({"max_tokens": 1.5}, {"max_tokens": "1"}, {"n": True}, {"max_tokens": -2}, {"seed": 1e300}):
        assert server.chat(**body).status_code == 400, body
    assert server.chat(grammar="").status_code == 200


def test_every_name_is_listed_but_no_path(fake_model: Any) -> None:
    names = ("one", "two", "/models/one.gguf")
    with running(fake_model(FakeBackend(scripted("ok"))), names=names) as server:
        assert [card["id"] for card in get(f"{server.url}/v1/models").json()["data"]] == ["one", "two"]
        assert get(f"{server.url}/v1/models/two").json()["id"] == "two"
        for name in (*names, "openai/two"):
            assert server.chat(model=name).status_code == 200
        assert server.chat(model="openai/other").status_code == 404


def asked(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **more})


def test_other_servers_names_of_the_same() -> None:
    assert asked(n_predict=5).max_tokens == 5
    assert asked(repetition_penalty=1.2).model_dump()["repeat_penalty"] == 1.2
    assert asked(n_predict=None, max_tokens=6).max_tokens == 6
    for both in {"n_predict": 5, "max_tokens": 6}, {"repetition_penalty": 1.2, "repeat_penalty": 1.1}:
        with pytest.raises(ValidationError, match="two names of one thing"):
            asked(**both)
    assert asked(thinking={"type": "disabled"}).template_values() == {"enable_thinking": False}
    assert asked(thinking={"type": "enabled", "budget_tokens": 9}).template_values() == {
        "enable_thinking": True
    }
    assert asked(thinking={"type": "adaptive"}).template_values() == {}


def test_messages_without_words() -> None:
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "so"}]
    said = [
        {"role": "assistant", "content": thought},
        {"role": "tool", "tool_call_id": "1", "content": None},
    ]
    made = template_messages(asked(messages=said).messages, None, True)
    assert [message["content"] for message in made] == ["so", ""]


def test_some_of_the_tools_may_be_called() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "abc"]

    def choice(mode: str, *names: str) -> dict[str, Any]:
        chosen = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": chosen}}

    plan = plan_tools(asked(tools=tools, tool_choice=choice("required", "c", "a")))
    assert plan is not None
    assert plan.forced
    assert [tool.told.name for tool in plan.callable] == ["a", "c"]
    assert len(plan.tools) == 3  # told to the model, as their order is a part of the prompt that is kept
    free = plan_tools(asked(tools=tools, tool_choice=choice("auto", "b")))
    assert free is not None
    assert not free.forced
    with pytest.raises(ApiError, match="'d' is not among the tools"):
        plan_tools(asked(tools=tools, tool_choice=choice("auto", "a", "d")))


def test_a_prediction_is_handed_on(server: Any, backend: Noting) -> None:
    """As text or in parts; drafts may be looked up in it."""
    for content in ("so it is", [{"type": "text", "text": "so it"}, {"type": "text", "text": " is"}]):
        answer = server.chat(prediction={"type": "content", "content": content}).json()
        assert bytes(backend.prediction) == b"so it is"
        assert answer["choices"][0]["message"]["content"] == "ok"
        nothing = {"reasoning_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        assert answer["usage"]["completion_tokens_details"] == nothing
    server.chat()
    assert not backend.prediction


@pytest.mark.parametrize(
    "wrong", ["x", {"type": "content"}, {"type": "words", "content": "x"}, {"content": 1}]
)
def test_a_prediction_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ValidationError, match="prediction"):
        ChatRequest.model_validate({"messages": USER, "prediction": wrong})


def test_drafts_are_told_as_openai_tells_predictions() -> None:
    spent = Spent()
    for drafted, accepted in ((10, 7), (4, 4)):
        receipt = Receipt(speculation=Speculation("ngram", drafted, accepted, mean_length=2.0))
        spent.add(Chunk("", None, 3, 20, 5.0, "stop", receipt), is_first=True)
    usage = spent.usage()
    details = {"reasoning_tokens": 0, "accepted_prediction_tokens": 11, "rejected_prediction_tokens": 3}
    assert usage["completion_tokens_details"] == details
    assert usage["receipt"]["speculation"]["drafted"] == 14
    assert usage["receipt"]["speculation"]["mean_length"] == 2.0  # no sum means anything
