"""A conversation keeps what was said, also when an answer is cut short or fails."""

import pytest
from fake_backend import FakeBackend, scripted

from mobile_gguf.api.conversation import Conversation
from mobile_gguf.errors import ExpertReadError


def ask(conversation, model, text):
    return "".join(chunk.text for chunk in conversation.ask(model, text))


def test_turns_are_kept(fake_model):
    model, conversation = fake_model(FakeBackend(scripted("fine"))), Conversation(system="Be brief.")
    assert ask(conversation, model, "How are you?") == "fine"
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "fine"},
    ]
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_an_interrupted_answer_is_kept_as_far_as_it_got(fake_model):
    backend, conversation = FakeBackend(scripted("abcdef")), Conversation()
    backend.errors[3] = KeyboardInterrupt()
    assert ask(conversation, fake_model(backend), "x") == "abc"
    assert conversation.turns[-1] == {"role": "assistant", "content": "abc"}


def test_an_answer_the_consumer_left_is_kept_as_far_as_it_got(fake_model):
    conversation = Conversation()
    for chunk in conversation.ask(fake_model(FakeBackend(scripted("abcdef"))), "x"):
        if chunk.text == "b":
            break
    assert conversation.turns[-1] == {"role": "assistant", "content": "ab"}


def test_a_turn_that_failed_is_taken_back(fake_model):
    backend, conversation = FakeBackend(scripted("abc")), Conversation()
    model = fake_model(backend)
    ask(conversation, model, "one")
    backend.errors[backend.n_evaluations + 1] = ExpertReadError("short read")
    with pytest.raises(ExpertReadError):
        ask(conversation, model, "two")
    assert [turn["content"] for turn in conversation.turns] == ["one", "abc"]
    assert ask(conversation, model, "three") == "abc"
