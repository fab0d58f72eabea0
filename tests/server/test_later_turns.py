"""What was thought in earlier turns: the chat template keeps or drops it, whoever holds the conversation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from page_harness import ask, opened
from server_harness import running
from speaking import DROPS, KEEPS, SHORT, has_thought, prompts, use

import mobile_gguf
from mobile_gguf.api.conversation import Conversation
from mobile_gguf.api.last_conversation import recall
from mobile_gguf.api.model import Model
from mobile_gguf.cli import main
from mobile_gguf.cli import run as run_verb
from mobile_gguf.cli.chat import Repl


@pytest.fixture(scope="module")
def model(demo_gguf: Path) -> Iterator[Model]:
    with mobile_gguf.load(demo_gguf, ram_budget="60%", n_ctx=1024, threads=1) as loaded:
        yield loaded


@contextlib.contextmanager
def lent(model: Model) -> Iterator[Model]:
    """The model where one is loaded, which stays open."""
    yield model


def by_run(model: Model, monkeypatch: pytest.MonkeyPatch, *_more: Any) -> str:
    monkeypatch.setattr(run_verb, "load_model", lambda _args: lent(model))
    flags = ["--reasoning-budget", "4", "--max-tokens", "14", "--temp", "0"]
    assert main(["run", "--continue=trip", "demo", "one", *flags]) == 0
    assert main(["run", "--continue=trip", "demo", "two", *flags]) == 0
    conversation, _ = recall("trip")
    assert conversation is not None
    return conversation.turns[1]["reasoning_content"]


def by_plain_chat(model: Model, monkeypatch: pytest.MonkeyPatch, *_more: Any) -> str:
    repl = Repl(model, Conversation(), SHORT)
    repl.serve("one")
    repl.serve("two")
    return repl.conversation.turns[1]["reasoning_content"]


def by_page(model: Model, _monkeypatch: Any, browser: Any) -> str:
    with running(model, defaults=SHORT) as server, opened(browser, server) as page:
        ask(page, "one")
        page.wait_for_selector(".again")
        ask(page, "two")
        page.wait_for_selector(".assistant >> nth=1 >> .again")
        return page.locator(".thoughts .text").first.text_content()


@pytest.mark.parametrize("template", [KEEPS, DROPS], ids=["keeps", "drops"])
@pytest.mark.parametrize("ask_twice", [by_run, by_plain_chat, by_page])
def test_the_template_says_what_stays(
    model: Model,
    browser: Any,
    monkeypatch: pytest.MonkeyPatch,
    ask_twice: Callable[..., str],
    template: str,
) -> None:
    use(model, template)
    with prompts() as made:
        thought = ask_twice(model, monkeypatch, browser)
    assert has_thought(made[-1], thought) == (template == KEEPS)
