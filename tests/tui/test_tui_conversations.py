"""Conversations that are kept: found, opened, renamed, deleted, exported; and where they cannot be."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

from tui_app import ANSWER, chat, say, submit, toasts, until

from mobile_gguf.tui.screens.confirm import Confirm
from mobile_gguf.tui.screens.conversations import Conversations
from mobile_gguf.tui.widgets.turn_view import AnswerView


def run(coroutine):
    return asyncio.run(coroutine)


def contents(app):
    return [turn.content for turn in app.chat.session.turns]


def test_conversations_are_found_opened_renamed_and_deleted(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "about the sky")
            await pilot.press("ctrl+n")
            await say(app, pilot, "about bread")
            await say(app, pilot, "/rename Baking")
            await pilot.press("ctrl+r")
            await until(pilot, lambda: isinstance(app.screen, Conversations))
            assert [item.title for item in app.screen.found] == ["Baking", "about the sky"]
            await pilot.press(*"sky")
            assert [item.title for item in app.screen.found] == ["about the sky"]
            await pilot.press("enter")
            await until(pilot, lambda: contents(app) == ["about the sky", ANSWER])
            assert app.chat.query_one(AnswerView).markdown.source == ANSWER
            await pilot.press("ctrl+r", "ctrl+d", "y")
            await until(pilot, lambda: [s.title for s in app.store.search()] == ["about the sky"])
            await pilot.press("ctrl+e", *"!", "enter")
            assert [item.title for item in app.screen.found] == ["about the sky!"]
            await pilot.press("escape")
            await submit(app, pilot, "/delete")
            assert isinstance(app.screen, Confirm)
            await pilot.press("y")
            await until(pilot, lambda: contents(app) == [])
            assert app.store.search() == []

    run(go())


def test_the_last_conversation_goes_on(tmp_path):
    async def go(*, system="", expected):
        async with chat(tmp_path, goes_on="last", system=system) as (app, pilot):
            assert contents(app) == expected
            assert app.chat.session.system == (system or "be brief" if expected else system)
            if expected:
                assert app.chat.query_one(AnswerView).markdown.source == ANSWER
            else:
                await say(app, pilot, "/system be brief")
            await say(app, pilot, "and then?")
            assert contents(app) == [*expected, "and then?", ANSWER]
            assert len(app.store.search()) == 1

    run(go(expected=[]))
    run(go(expected=["and then?", ANSWER]))
    run(go(system="be long", expected=["and then?", ANSWER] * 2))


def test_an_export_is_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "Why is it blue?")
            await say(app, pilot, "/export")
            text = (tmp_path / "why-is-it-blue.md").read_text()
            assert text.startswith(
                "# Why is it blue?\n\n## You\n\nWhy is it blue?\n\n## fake\n\nIt **scatters**"
            )
            await say(app, pilot, "/export")
            assert "exists" in toasts(app)
            await say(app, pilot, "/export /nonexistent/x.md")
            assert "cannot write /nonexistent/x.md: No such file or directory" in toasts(app)
            assert not Path("/nonexistent").exists()
            await say(app, pilot, "/export /dev/null")
            assert Path("/dev/null").is_char_device()

            def full(path, text, **_more):
                path.write_bytes(text[:9].encode())
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(Path, "write_text", full)
            await say(app, pilot, "/export why-is-it-blue.md")
            assert "the disk is full: free some space there" in toasts(app)
            assert (tmp_path / "why-is-it-blue.md").read_text() == text
            assert not list(tmp_path.glob("*.partial"))

    run(go())


def test_conversations_that_cannot_be_saved_stay_on_the_screen(tmp_path):
    async def go():
        (tmp_path / "conversations.db").write_bytes(b"this is no database, but long enough to look at" * 20)
        async with chat(tmp_path) as (app, pilot):
            line = app.chat.query_one("#unsaved")
            assert line.display
            assert "/save" in str(line.content)
            await say(app, pilot, "one")
            assert contents(app) == ["one", ANSWER]
            assert line.display  # for as long as it is so
            await submit(app, pilot, "/save")
            assert isinstance(app.screen, Confirm)
            await pilot.press("y")
            await pilot.pause()
            assert not line.display
            assert [item.title for item in app.store.search()] == ["one"]
            assert len(list(tmp_path.glob("conversations.db.broken-*"))) == 1

    run(go())
