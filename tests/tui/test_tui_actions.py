"""The actions of the TUI by their keys and commands: screens, lists, dialogs, settings, models."""

from __future__ import annotations

import asyncio

import pytest
from fake_backend import FakeBackend, scripted
from textual.widgets import Input, OptionList, Select, Static
from tui_app import ANSWER, Loader, chat, say, submit, toasts, until

from mobile_gguf.tui import app as app_module
from mobile_gguf.tui.engine.outbox import Token
from mobile_gguf.tui.screens import models as picker
from mobile_gguf.tui.screens.confirm import Confirm
from mobile_gguf.tui.screens.conversations import Conversations
from mobile_gguf.tui.screens.help import Help
from mobile_gguf.tui.screens.jobs import JobsScreen
from mobile_gguf.tui.screens.map import MapScreen
from mobile_gguf.tui.screens.models import ModelPicker
from mobile_gguf.tui.screens.settings import SettingsScreen
from mobile_gguf.tui.screens.text import TextScreen
from mobile_gguf.tui.store.models import Candidate, Fit
from mobile_gguf.tui.widgets.turn_view import AnswerView, QuestionView


def run(coroutine):
    return asyncio.run(coroutine)


def contents(app):
    return [turn.content for turn in app.chat.session.turns]


def two_models(monkeypatch):
    found = [Candidate("demo", None, 164 << 20), Candidate("qwen3", None, 18 << 30)]
    monkeypatch.setattr(app_module, "candidates", lambda: found)
    monkeypatch.setattr(picker, "fit_of", lambda *_: Fit("moe", "128 x 48", "fits"))


@pytest.mark.parametrize("key", ["ctrl+o", "f2"])
def test_a_model_is_picked(tmp_path, monkeypatch, key):
    two_models(monkeypatch)

    async def go():
        async with chat(tmp_path) as (app, pilot):
            await pilot.press(key)
            await until(pilot, lambda: len(app.screen.fits) == 2)
            assert isinstance(app.screen, ModelPicker)
            await pilot.press("down")
            assert isinstance(app.focused, OptionList)
            await pilot.press("down", "enter")
            await until(pilot, lambda: not app.chat.busy and app.chat.reference == "qwen3")
            await pilot.press(key)
            await until(pilot, lambda: len(app.screen.fits) == 2)
            await pilot.press(*"dem")
            assert app.screen.query_one(OptionList).option_count == 1
            await pilot.press("enter")
            await until(pilot, lambda: not app.chat.busy and app.chat.reference == "demo")
            await pilot.press(key)
            await until(pilot, lambda: len(app.screen.fits) == 2)
            await pilot.press(*"hf:a/b", "enter")
            await until(pilot, lambda: not app.chat.busy and app.chat.reference == "hf:a/b")
            await pilot.press(key, "escape")
            assert app.screen is app.chat

    run(go())


def test_an_open_select_shows_all_its_words(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await pilot.press("ctrl+s")
            select = app.screen.query_one("#mode", Select)
            select.focus()
            below = app.screen.query_one("#gamma", Input).region
            await pilot.press("enter")
            overlay = app.screen.query_one("#mode SelectOverlay", OptionList)
            await until(pilot, lambda: overlay.region.height > 0)
            assert overlay.region.height >= overlay.option_count == 4
            assert app.screen.query_one("#gamma", Input).region == below

    run(go())


@pytest.mark.parametrize("key", ["ctrl+s", "f4"])
def test_settings_are_changed_reset_and_loaded(tmp_path, key):
    async def go():
        loader = Loader()
        async with chat(tmp_path, loader=loader) as (app, pilot):
            await pilot.press(key)
            assert isinstance(app.screen, SettingsScreen)
            box = app.screen.query_one("#temperature", Input)
            box.focus()
            await pilot.press("end", "ctrl+u", *"0.25")
            assert app.settings.value("temperature") == 0.25
            await pilot.press("x")
            assert "must be a number" in str(app.screen.query_one("#problem", Static).content)
            await pilot.press("ctrl+d")
            assert (app.settings.value("temperature"), box.value) == (0.8, "0.8")
            select = app.screen.query_one("#mode", Select)
            select.value = "little"
            await until(pilot, lambda: app.settings.value("mode") == "little")
            select.focus()
            await pilot.press("ctrl+d")
            await until(pilot, lambda: app.settings.value("mode") != "little")
            for name in ("cache_prompt",):
                select, before = app.screen.query_one(f"#{name}", Select), app.settings.value(name)
                assert select.value == ("on" if before else "off")
                select.focus()
                await pilot.press("enter", "up" if before is False else "down", "enter")
                assert app.settings.value(name) is not before
                await pilot.press("ctrl+d")
                assert app.settings.value(name) is before
                assert select.value == ("on" if before else "off")
            select = app.screen.query_one("#flash_attn", Select)
            assert (select.value, app.settings.value("flash_attn")) == ("auto", "auto")
            select.value = "on"
            await until(pilot, lambda: app.settings.value("flash_attn") is True)
            select.focus()
            await pilot.press("ctrl+d")
            await until(pilot, lambda: app.settings.value("flash_attn") == "auto")
            assert select.value == "auto"
            budget = app.screen.query_one("#ram_budget", Input)
            budget.focus()
            await pilot.press("end", "ctrl+u", *"50%")
            assert "Ctrl-L" in str(app.screen.query_one("#problem", Static).content)
            await pilot.press("ctrl+l")
            await until(pilot, lambda: len(loader.options) == 2 and not app.chat.busy)
            assert str(loader.options[1]["ram_budget"]) == "50%"

    run(go())


@pytest.mark.parametrize(
    ("key", "screen"),
    [("f1", Help), ("f3", Conversations), ("ctrl+r", Conversations), ("f8", JobsScreen), ("f9", MapScreen)],
)
def test_a_key_opens_a_screen_and_escape_leaves_it(tmp_path, key, screen):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await pilot.press(key)
            assert isinstance(app.screen, screen)
            await pilot.press("escape")
            assert app.screen is app.chat

    run(go())


@pytest.mark.parametrize("key", ["f9", "f6", "ctrl+g", "q"])
def test_the_full_map_is_left_by_any_key_that_opens_a_map(tmp_path, key):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await pilot.press("f9", key)
            assert app.screen is app.chat

    run(go())


def test_the_second_keys_do_what_the_first_do(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            shown = app.chat.query_one("#experts").display
            await pilot.press("f6")
            assert app.chat.query_one("#experts").display != shown
            await pilot.press("f7")
            assert app.chat.coloured
            await pilot.press("f5")
            assert contents(app) == []
            await pilot.press(*"a", "ctrl+enter", "b", "alt+enter", "c")
            assert app.chat.prompt.text == "a\nb\nc"
            await pilot.press("ctrl+c")
            assert app.chat.prompt.text == ""
            await pilot.press("ctrl+c")
            assert "Ctrl-Q leaves" in toasts(app)
            await pilot.press("ctrl+p")
            assert type(app.screen).__name__ == "CommandPalette"

    run(go())


def test_the_pages_of_a_long_answer(tmp_path):
    async def go():
        loader = Loader()
        loader.backends["fake"] = FakeBackend(scripted("line\n\n" * 80), n_ctx=4096)
        async with chat(tmp_path, loader=loader) as (app, pilot):
            await say(app, pilot, "one")
            transcript = app.chat.query_one("#transcript")
            await until(pilot, lambda: transcript.max_scroll_y > 60 and transcript.is_vertical_scroll_end)
            await pilot.press("pageup")
            await until(pilot, lambda: transcript.scroll_y < transcript.max_scroll_y)
            above = transcript.scroll_y
            await pilot.press("pagedown")
            await until(pilot, lambda: transcript.scroll_y > above)

    run(go())


def test_a_question_is_answered_no_by_its_key_and_its_button(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            for no in (lambda: pilot.press("n"), lambda: pilot.click("#no")):
                await submit(app, pilot, "/delete")
                assert isinstance(app.screen, Confirm)
                await no()
                assert app.screen is app.chat
                assert contents(app) == ["one", ANSWER]
            await submit(app, pilot, "/delete")
            await pilot.click("#yes")
            await until(pilot, lambda: contents(app) == [])

    run(go())


def test_the_list_of_conversations_has_the_arrow_keys(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            await pilot.press("ctrl+r", "down")
            assert isinstance(app.focused, OptionList)
            await pilot.press("enter")
            assert app.screen is app.chat

    run(go())


def test_what_is_in_the_transcript_has_keys(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            app.chat.query_one(AnswerView).focus()
            await pilot.press("c")
            assert app.clipboard == ANSWER
            app.chat.query_one(QuestionView).focus()
            await pilot.press("e")
            assert app.chat.prompt.text == "one"

    run(go())


def test_thoughts_are_folded_until_a_key_opens_them(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            view = app.chat.query_one(AnswerView)
            assert not view.thoughts.display
            view.focus()
            await pilot.press("t")  # nothing was thought
            assert view.thoughts.collapsed
            view.add([Token("", "big", reasoning=" how so ")])
            assert view.text == ANSWER
            assert view.thoughts.display
            for collapsed in (False, True):
                await pilot.press("t")
                assert view.thoughts.collapsed is collapsed
            await view.restore("ho", [Token("", "big", reasoning="why")], "")
            assert (view.text, view.thought) == ("ho", "why")

    run(go())


def test_commands_without_a_screen_do_what_they_say(tmp_path):
    async def go():
        loader = Loader()
        async with chat(tmp_path, loader=loader) as (app, pilot):
            await say(app, pilot, "one")
            await submit(app, pilot, "/system be brief")
            assert app.chat.session.system == "be brief"
            await submit(app, pilot, "/system none")
            assert app.chat.session.system == ""
            await submit(app, pilot, "/theme nord")
            assert app.theme == "nord"
            await submit(app, pilot, "/theme mauve")
            assert "no theme 'mauve'" in toasts(app)
            shown = app.chat.query_one("#experts").display
            await submit(app, pilot, "/map")
            assert app.chat.query_one("#experts").display != shown
            await submit(app, pilot, "/tokens")
            assert app.chat.coloured
            await submit(app, pilot, "/edit")
            assert app.chat.prompt.text == "one"
            await submit(app, pilot, "/stop")
            await say(app, pilot, "/regenerate")
            assert contents(app) == ["one", ANSWER]
            await submit(app, pilot, "/reload")
            await until(pilot, lambda: len(loader.options) == 2 and not app.chat.busy)
            await submit(app, pilot, "/nonsense")
            assert "unknown command /nonsense" in toasts(app)
            await submit(app, pilot, "/new")
            assert contents(app) == []
            await submit(app, pilot, "/quit")
        assert app.return_code == 0

    run(go())


@pytest.mark.parametrize(
    ("command", "screen"),
    [
        ("/help", Help),
        ("/model", ModelPicker),
        ("/search", Conversations),
        ("/settings", SettingsScreen),
        ("/stats", TextScreen),
        ("/jobs", JobsScreen),
    ],
)
def test_a_command_opens_a_screen(tmp_path, monkeypatch, command, screen):
    two_models(monkeypatch)

    async def go():
        async with chat(tmp_path) as (app, pilot):
            await submit(app, pilot, command)
            assert isinstance(app.screen, screen)
            await pilot.press("escape")
            assert app.screen is app.chat

    run(go())


def test_the_palette_obeys(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            ours = {item.title: item for item in app.get_system_commands(app.screen)}
            assert {"/help", "/model", "/jobs", "/quit"} <= set(ours)
            ours["/jobs"].callback()
            await until(pilot, lambda: isinstance(app.screen, JobsScreen))

    run(go())
