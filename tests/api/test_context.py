"""A chat that is longer than the context: which turns go, and that everybody says so."""

from __future__ import annotations

from typing import Any

import pytest
from fake_backend import FakeBackend, scripted
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.api.context import (
    fit_chat,
    of_a_chat,
    reserve_for,
    split_turns,
    turns_to_leave_out,
    without_turns,
)
from mobile_gguf.api.conversation import Conversation
from mobile_gguf.errors import PromptTooLongError, UsageError


def message(role: str, content: str = "x") -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_turn_is_a_question_with_all_that_follows_it():
    roles = ["system", "assistant", "user", "assistant", "tool", "assistant", "system", "user"]
    messages = [message(role, str(at)) for at, role in enumerate(roles)]
    assert split_turns(messages) == [[1], [2, 3, 4, 5], [7]]
    assert [m["content"] for m in without_turns(messages, 2)] == ["0", "6", "7"]
    assert without_turns(messages, 0) == messages


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(0, 30), st.integers(20, 200))
def test_what_stays_fits_and_stays_for_a_while(sizes, fixed, room):
    n = turns_to_leave_out(sizes, fixed, room)
    assert 0 <= n < len(sizes)
    assert fixed + sum(sizes[n:]) <= room or n == len(sizes) - 1
    before = [turns_to_leave_out(sizes[: at + 1], fixed, room) for at in range(len(sizes))]
    assert before == sorted(before)  # a turn that is gone does not come back
    if fixed + sum(sizes) <= room:
        assert n == 0


def test_turns_go_in_blocks_so_that_the_beginning_stays_the_same():
    cuts = [turns_to_leave_out([10] * n, 0, 100) for n in range(1, 31)]
    assert cuts[:10] == [0] * 10
    assert len(set(cuts)) < 10


def test_the_answer_keeps_room_within_an_eighth_of_the_context():
    assert [reserve_for(4096, asked) for asked in (None, -1, 50, 4000)] == [512, 512, 50, 512]
    assert reserve_for(120, None) == 15


def test_one_turn_that_is_too_long_is_left_whole():
    kept = fit_chat([message("system"), message("user", "y" * 50)], lambda m: [0] * 60, len, 20)
    assert (len(kept), kept.turns_left_out) == (60, 0)


def test_only_a_chat_that_goes_on_trims_by_itself():
    assert of_a_chat({})["context_full"] == of_a_chat({"context_full": "auto"})["context_full"] == "trim"
    assert of_a_chat({"context_full": "stop"})["context_full"] == "stop"


def test_a_conversation_goes_on_when_the_context_is_full(fake_model):
    backend = FakeBackend(scripted("answer"), n_ctx=200)
    model = fake_model(backend, n_ctx=200)
    conversation = Conversation("be brief")
    last = [list(conversation.ask(model, f"question {at}"))[-1] for at in range(12)]
    left_out = [chunk.receipt.turns_left_out for chunk in last]
    assert left_out[0] == 0
    assert left_out[-1] > 5
    assert len(conversation.turns) == 24  # nothing is forgotten here
    prompt = bytes(row[0] for row in backend.rows if row[0] < 256)
    assert prompt.startswith(b"<system>be brief\n<user>question ")
    assert b"question 11" in prompt
    assert b"question 0\n" not in prompt
    assert "left out" in last[-1].receipt.summary()


def test_stopping_and_a_question_that_is_too_long_are_one_error_with_the_way_out(fake_model):
    model = fake_model(FakeBackend(scripted("answer"), n_ctx=100), n_ctx=100)
    conversation = Conversation(turns=[message("user", "question"), message("assistant", "answer")] * 6)
    with pytest.raises(UsageError, match=r"the context only 100: shorten it, or load .* n_ctx"):
        list(conversation.ask(model, "question", context_full="stop"))
    with pytest.raises(UsageError, match="n_ctx"):
        list(Conversation().ask(model, "long " * 50))
    with pytest.raises(UsageError, match="n_ctx"):
        model.chat([message("user", "x" * 40)] * 3)


def test_the_end_of_the_context_is_told_from_a_limit(fake_model):
    model = fake_model(FakeBackend(scripted("answer", end=False), n_ctx=40), n_ctx=40)
    full = model.generate("prompt")
    assert (full.finish_reason, full.receipt.context_full) == ("length", True)
    assert model.generate("prompt", max_tokens=500).receipt.context_full
    cut = model.generate("prompt", max_tokens=5)
    assert (cut.finish_reason, cut.receipt.context_full) == ("length", False)


def test_a_chat_that_is_too_long_to_count_is_trimmed_and_a_question_is_not() -> None:
    def render(messages: list[dict[str, Any]]) -> list[int]:
        n = sum(len(message["content"]) for message in messages)
        if n > 100:
            raise PromptTooLongError("far too long")
        return [0] * n

    talk = [{"role": "user", "content": "x" * 40} for _ in range(9)]
    made = fit_chat(talk, render, len, 60)
    assert (len(made), made.turns_left_out) == (40, 8)
    for question in (talk[:1], talk):
        with pytest.raises(PromptTooLongError):
            fit_chat([*question[1:], {"role": "user", "content": "x" * 101}], render, len, 60)
