"""What Python's callers may get wrong: an error in their own words, and nothing half done."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend, scripted

import mobile_gguf
from mobile_gguf import UsageError
from mobile_gguf.api.messages import as_messages
from mobile_gguf.api.words import python_words, with_flags
from mobile_gguf.cli import _Notes
from mobile_gguf.errors import BudgetError

HALF = "\ud83d"


@pytest.fixture
def model(fake_model):
    return fake_model(FakeBackend(scripted("ok")))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.generate(b"hi"), "b'hi' is neither text nor token ids"),
        (lambda m: m.generate([1.5]), "1.5 is no token id"),
        (lambda m: m.generate([999999]), "token 999999 is not in the vocabulary of 258"),
        (lambda m: m.generate([-1]), "token -1 is not in the vocabulary"),
        (lambda m: m.generate([2**70]), "is not in the vocabulary"),
        (lambda m: m.generate(None), "None is neither text nor token ids"),
        (lambda m: m.generate(HALF), "the prompt is not UTF-8 text"),
        (lambda m: m.generate("x", stop=7), "stop is 7: it must be text"),
        (lambda m: m.generate("x", max_tokens="5"), "max_tokens is '5': it must be a whole number"),
        (lambda m: m.generate("x", should_stop=5), "should_stop is 5: it must be a function"),
        (lambda m: m.generate("x", on_chunk=5), "on_chunk is 5: it must be a function"),
        (lambda m: m.stream("x", on_prompt=5), "on_prompt is 5: it must be a function"),
        (lambda m: m.generate("x", gamma=3), "gamma is 3.0: it must be at most 2"),
        (lambda m: m.chat(HALF), "the user's message is not UTF-8 text"),
        (lambda m: m.chat(None), "messages are None: give text, or a list"),
        (lambda m: m.chat(b"hi"), "messages are b'hi'"),
        (lambda m: m.chat({"role": "user", "content": "x"}), "messages are "),
        (lambda m: m.chat(["hi"]), "needs role and content, not 'hi'"),
        (lambda m: m.chat([{"role": 5, "content": "x"}]), "the role of a message is 5"),
        (lambda m: m.chat([{"role": "user", "content": None}]), "the user's content is None"),
        (lambda m: m.chat([{"role": "user", "content": 5}]), "the user's content is 5"),
        (lambda m: m.chat([{"role": "user", "content": ["hi"]}]), "the user's content has 'hi'"),
        (
            lambda m: m.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "a part of type 'image_url'",
        ),
        (lambda m: m.configure(n_ctx=100), "n_ctx cannot be configured"),
        (lambda m: m.configure(ram_budget="2G"), "ram_budget cannot be configured"),
        (lambda m: setattr(m, "gamma", 3), "gamma is 3.0: it must be at most 2"),
        (lambda m: setattr(m, "gama", 0.5), "no attribute 'gama'; did you mean gamma?"),
        (lambda m: setattr(m, "temperature", 0.5), "no attribute 'temperature': mode, gamma and little_k"),
        (lambda m: m.embed(["a", "b"], pooling="mean"), "'a' is no token id"),
        (lambda m: m.embed(b"a", pooling="mean"), "b'a' is neither text nor token ids"),
        (lambda m: m.embed(HALF, pooling="mean"), "the text is not UTF-8 text"),
        (lambda m: m.tokenize(5), "text is 5: it must be text"),
        (lambda m: m.tokenize(HALF), "text is not UTF-8 text"),
        (lambda m: m.detokenize(["a"]), "'a' is no token id"),
        (lambda m: m.detokenize([49152000]), "token 49152000 is not in the vocabulary"),
        (lambda m: m.piece(1.5), "1.5 is no token id"),
        (lambda m: m.is_end("a"), "'a' is no token id"),
    ],
)
def test_what_cannot_be_meant_is_said_by_name(model, call, said):
    with pytest.raises(UsageError) as error:
        call(model)
    assert said in str(error.value)
    assert model.generate("x").text == "ok"  # it stays usable


@pytest.mark.parametrize("reference", [5, None, b"x", ["demo"]])
def test_a_model_is_named_by_text_or_a_path(reference):
    with pytest.raises(UsageError, match=r"model is .*: it must be a path or a name"):
        mobile_gguf.load(reference)  # pyright: ignore


def test_an_empty_name_is_no_model():
    with pytest.raises(mobile_gguf.ModelNotFoundError, match="no such model: an empty name"):
        mobile_gguf.load("")


def test_parts_of_text_are_joined_as_the_server_joins_them():
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": " two"}]
    assert as_messages([{"role": "user", "content": parts, "name": "me"}]) == [
        {"role": "user", "content": "one two", "name": "me"}
    ]
    called = {"role": "assistant", "content": None, "tool_calls": [{"x": HALF}]}
    with pytest.raises(UsageError, match="the assistant's message is not UTF-8 text"):
        as_messages([called])


def test_numbers_of_numpy_are_tokens(model):
    assert model.generate(np.array([104, 105])).text == "ok"


def test_errors_name_options_as_their_caller_writes_them(fake_load, monkeypatch, capsys):
    text = "--ram-budget 1.0 KiB is too small: a smaller --ctx-size, or `mobile-gguf convert --export`"
    assert python_words(text) == text.replace("--ram-budget", "ram_budget").replace("--ctx-size", "n_ctx")
    fake_load()

    def refuse(*_):
        raise BudgetError(text)

    monkeypatch.setattr("mobile_gguf.api.loading.open_backend", refuse)
    with pytest.raises(BudgetError, match=r"^ram_budget 1\.0 KiB is too small: a smaller n_ctx"):
        mobile_gguf.load("m.gguf")
    from mobile_gguf.cli import main

    assert main(["run", "m.gguf", "hi"]) == 2
    assert capsys.readouterr().err == f"mobile-gguf: error: {text}\n"


def test_the_signatures_still_tell_the_options():
    for function in (mobile_gguf.load, mobile_gguf.Model.chat):
        assert "temperature" in inspect.signature(function).parameters or "n_ctx" in str(
            inspect.signature(function)
        )


def test_one_waits_while_one_runs(fake_model):
    """A queue of one holds one beside the answer that runs, however soon it is asked for."""
    import asyncio

    from mobile_gguf.api.aio import Worker

    async def go():
        worker = Worker(queue=1)
        gate = SimpleNamespace(open=False)

        def slow(_job):
            while not gate.open:
                pass
            yield 1

        jobs = [worker.submit(slow), worker.submit(slow)]
        with pytest.raises(mobile_gguf.QueueFullError):
            worker.submit(slow)
        gate.open = True
        done = [await anext(job) for job in jobs]
        await asyncio.to_thread(worker.close)
        return done

    assert asyncio.run(go()) == [1, 1]


def test_notices_name_options_as_their_reader_writes_them(
    fake_model: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fake_model()
    with caplog.at_level("WARNING", logger="mobile_gguf"), _Notes(sys.stderr):
        model._notify("no experts; --ram-budget has no effect, --verbose neither")
    said = "no experts; ram_budget has no effect, verbose neither"
    assert model.notices[-1] == caplog.messages[-1] == said
    shown = with_flags(model.notices[-1])
    assert shown == "no experts; --ram-budget has no effect, --verbose neither"
    assert capsys.readouterr().err == f"mobile-gguf: note: {shown}\n"
