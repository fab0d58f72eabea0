"""How the chat leaves the terminal, for a while or for good: Ctrl-Z, a dead terminal, SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
from unittest.mock import patch

from tui_app import chat, loader_of, slow_backend, submit, toasts, until

from mobile_gguf.tui.store.conversations import ConversationStore
from mobile_gguf.tui.widgets.turn_view import AnswerView


def saved(path):
    """What the answers of the first conversation in a file are."""
    store = ConversationStore(path)
    try:
        return [turn.content for turn in store.open(1)[2]]
    finally:
        store.close()


async def _until_words(app, pilot):
    await submit(app, pilot, "go on")
    await until(pilot, lambda: len(app.chat.query_one(AnswerView).text) > 8)


def test_sigterm_in_an_answer_keeps_its_words_and_leaves(tmp_path):
    async def go():
        async with chat(tmp_path, loader=loader_of(slow_backend())) as (app, pilot):
            with patch("mobile_gguf.tui.screens.chat._DRAFT_SECONDS", 1e9):
                await _until_words(app, pilot)
                os.kill(os.getpid(), signal.SIGTERM)
                await until(pilot, lambda: app.return_code is not None)
            assert app.return_value == 128 + signal.SIGTERM

    asyncio.run(go())
    question, answer = saved(tmp_path / "conversations.db")
    assert question == "go on"
    assert len(answer) > 8


def test_a_dead_terminal_in_an_answer_keeps_its_words(tmp_path):
    """The signal that ends the process is caught here: everything must be on the disk before it."""
    found = []

    async def go():
        async with chat(tmp_path, loader=loader_of(slow_backend())) as (app, pilot):
            real = os.kill

            def kill(process, number):
                assert (process, signal.getsignal(number)) == (os.getpid(), signal.SIG_DFL)
                found.extend(saved(tmp_path / "conversations.db"))

            with patch("mobile_gguf.tui.screens.chat._DRAFT_SECONDS", 1e9):
                await _until_words(app, pilot)
                with patch("mobile_gguf.tui.app.os.kill", kill):
                    real(os.getpid(), signal.SIGHUP)
                    await until(pilot, lambda: found)
            app.engine.stop()

    # whoever started the tests may have ignored it, as nohup does
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        asyncio.run(go())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found[0] == "go on"
    assert len(found[1]) > 8


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """``nohup mobile-gguf chat`` survives its terminal."""

    async def go():
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            async with chat(tmp_path):
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    asyncio.run(go())


def test_ctrl_z_without_a_shell_says_so_and_undo_has_another_key(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await pilot.press(*"ab", "ctrl+z")
            assert app.chat.prompt.text == "ab"
            assert "no shell waits for the chat" in toasts(app)
            await pilot.press("ctrl+underscore")
            assert app.chat.prompt.text == ""
            await pilot.press("ctrl+y")
            assert app.chat.prompt.text == "ab"

    asyncio.run(go())
