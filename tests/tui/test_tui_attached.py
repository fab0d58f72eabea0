"""The chat with a server's model, presets in the chat, and files in a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_stub import SECONDS, OpenAiStub, serving
from tui_app import Loader, chat, say, submit, toasts, until

from mobile_gguf.config import presets_dir
from mobile_gguf.generate.answer.receipt import Receipt
from mobile_gguf.remote.connection import Server
from mobile_gguf.tui.widgets.completion_list import CompletionList
from mobile_gguf.tui.widgets.side_panel import SidePanel
from mobile_gguf.tui.widgets.title_bar import TitleBar
from mobile_gguf.tui.widgets.turn_view import AnswerView, QuestionView

run = asyncio.run
MAP = {
    "layers": [0, 1],
    "n_expert": 4,
    "states": {"absent": "0", "loading": "1", "resident": "2", "hit": "3", "missed": "4"},
    "tiers": {"host": ["0222", "2000"]},
    "n_tokens": 1,
}


@pytest.fixture
def stub() -> Iterator[OpenAiStub]:
    with serving(OpenAiStub(models=[{"id": "m"}, {"id": "other"}])) as made:
        yield made


def test_a_chat_with_any_server(tmp_path: Path, stub: OpenAiStub) -> None:
    async def go() -> None:
        async with chat(tmp_path, reference="m", server=Server(stub.url)) as (app, pilot):
            title = app.chat.query_one(TitleBar)
            assert title.model == "m"
            assert title.detail == f"at {stub.url}"
            assert app.chat.query_one(SidePanel).state is None
            await say(app, pilot, "why?")
            (view,) = app.chat.query(AnswerView)
            assert view.text == "Blue light."
            assert app.chat.session.turns[-1].receipt.startswith("2 tokens")
            stub.status = 503
            await say(app, pilot, "and now?")
            assert "answers 503: the queue is full" in toasts(app)
            assert app.chat.prompt.text == "and now?"
            stub.status = 200
            await say(app, pilot, "/model other")
            await say(app, pilot, "/model none")
            assert "has no model none: it has m, other" in toasts(app)
            assert title.model == "other"
            await say(app, pilot, "again")
            assert stub.bodies[-1]["model"] == "other"
            assert "model" not in app.settings.extra

    run(go())


def test_esc_ends_an_answer_of_a_server(tmp_path: Path, stub: OpenAiStub) -> None:
    stub.hangs = True

    async def go() -> None:
        async with chat(tmp_path, reference="m", server=Server(stub.url)) as (app, pilot):
            await submit(app, pilot, "why?")
            await until(pilot, lambda: [view for view in app.chat.query(AnswerView) if view.text])
            await pilot.press("escape")
            await until(pilot, lambda: not app.chat.busy)
            assert app.chat.session.turns[-1].content == "Blue light."
            assert app.chat.session.turns[-1].receipt.endswith("| stopped")
            assert stub.left.wait(SECONDS)

    run(go())


def test_a_server_of_ours_shows_its_experts_and_receipt(tmp_path: Path, stub: OpenAiStub) -> None:
    meta = {"name": "Demo", "mode": "little", "n_ctx": 512}
    stub.models, stub.experts = [{"id": "demo", "owned_by": "mobile-gguf", "meta": meta}], MAP
    receipt = Receipt(mode="little", tokens_little=2, expert_hits=3, expert_misses=1).to_dict()
    stub.usage = [{"completion_tokens": 2, "tokens_per_second": 3.0, "receipt": receipt}] * 2

    async def go() -> None:
        async with chat(tmp_path, reference=stub.url, server=Server(stub.url)) as (app, pilot):
            assert app.chat.query_one(TitleBar).model == "Demo"
            state = app.chat.query_one(SidePanel).state
            assert state is not None
            await say(app, pilot, "why?")
            assert app.chat.session.turns[-1].receipt.startswith("0 big · 2 little | 75% hits")

    run(go())


def test_a_preset_in_the_chat(tmp_path: Path) -> None:
    presets_dir().mkdir(parents=True)
    (presets_dir() / "coder.toml").write_text("temperature = 0.25\nsystem = 'S'\n[serve]\nport = 1\n")
    (presets_dir() / "big.toml").write_text("model = 'big'\nn_ctx = 2048\n")
    loader = Loader()

    async def go() -> None:
        async with chat(tmp_path, loader=loader) as (app, pilot):
            await say(app, pilot, "/preset coder")
            assert app.settings.value("temperature") == 0.25
            assert app.chat.session.system == "S"
            await say(app, pilot, "/preset big")
            assert app.chat.reference == "big"
            assert loader.options[-1]["n_ctx"] == 2048
            await say(app, pilot, "/preset codr")
            assert "did you mean coder?" in toasts(app)
            app.chat.prompt.put("/preset c")
            await until(pilot, lambda: app.chat.query_one(CompletionList).display)
            assert [one.line for one in app.chat.query_one(CompletionList).completions] == ["/preset coder"]

    run(go())


def test_a_file_in_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("buy milk\n")
    (tmp_path / "my list.txt").write_text("eggs\n")

    async def completions(app: Any, pilot: Any, typed: str) -> list[str]:
        app.chat.prompt.put(typed)
        await pilot.pause()
        return [one.line for one in app.chat.query_one(CompletionList).completions]

    async def go() -> None:
        async with chat(tmp_path) as (app, pilot):
            assert await completions(app, pilot, "read @no") == ["read @notes.txt"]
            assert await completions(app, pilot, 'read @"my') == ['read @"my list.txt"']
            assert await completions(app, pilot, "read @my") == ['read @"my list.txt"']
            assert await completions(app, pilot, "me@no") == []
            await completions(app, pilot, "read @no")
            await pilot.press("tab")
            assert app.chat.prompt.text == "read @notes.txt"
            await pilot.press("enter")
            await until(pilot, lambda: len(app.chat.session.turns) == 2)
            asked = app.chat.session.turns[0].content
            assert asked == "read \n=== notes.txt ===\nbuy milk\n=== end of notes.txt ==="
            assert [view.text for view in app.chat.query(QuestionView)] == ["read \n@notes.txt"]
            assert "@notes.txt" in app.chat.session.title
            await until(pilot, lambda: not app.chat.busy)
            await submit(app, pilot, "and @none.txt?")
            assert "@none.txt: there is no such file" in toasts(app)
            assert app.chat.prompt.text == "and @none.txt?"
            assert len(app.chat.session.turns) == 2
            app.chat.edit(0)
            assert app.chat.prompt.text == "read \n@notes.txt"

    run(go())
