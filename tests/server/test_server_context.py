"""A chat that is longer than the context, as a client meets it."""

from __future__ import annotations

import pytest
from fake_backend import FakeBackend, scripted

pytest.importorskip("fastapi", reason="pip install -e '.[server]'")

from server_harness import running


@pytest.fixture
def server(fake_model):
    backend = FakeBackend(scripted("ok"), n_ctx=512)
    with running(fake_model(backend, n_ctx=512)) as found:
        yield found


def turns(n: int) -> list[dict[str, str]]:
    said = [{"role": "system", "content": "be brief"}]
    for at in range(n):
        said += [{"role": "user", "content": f"question {at}"}, {"role": "assistant", "content": "answer"}]
    return [*said, {"role": "user", "content": "the last one"}]


def test_the_oldest_turns_are_left_out_and_counted(server):
    short = server.post("/v1/chat/completions", {"messages": turns(2)}).json()
    assert short["usage"]["turns_left_out"] == short["usage"]["receipt"]["turns_left_out"] == 0
    long = server.post("/v1/chat/completions", {"messages": turns(40)})
    assert long.status_code == 200
    usage = long.json()["usage"]
    assert 30 < usage["turns_left_out"] == usage["receipt"]["turns_left_out"] < 40
    assert usage["prompt_tokens"] + 512 // 8 <= 512


def test_a_client_may_have_it_refused_and_one_message_is_in_any_case(server):
    for body in (
        {"messages": turns(40), "context_full": "stop"},
        {"messages": [{"role": "user", "content": "long " * 200}]},
    ):
        refused = server.post("/v1/chat/completions", body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_of_several_choices_counts_its_turns_once(server):
    usage = server.post("/v1/chat/completions", {"messages": turns(40), "n": 2}).json()["usage"]
    assert usage["turns_left_out"] == usage["receipt"]["turns_left_out"]
