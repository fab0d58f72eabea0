"""The chat screen: asking, stopping, editing, saving; every action by its key, on a scripted model."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fake_backend import FakeBackend, scripted
from textual import events
from textual.geometry import Size
from tui_app import ANSWER, Loader, chat, loader_of, say, slow_backend, submit, toasts, until

from mobile_gguf.errors import ExpertReadError, ModelNotFoundError, UsageError
from mobile_gguf.tui.screens.help import Help
from mobile_gguf.tui.screens.models import ModelPicker
from mobile_gguf.tui.widgets.completion_list import CompletionList
from mobile_gguf.tui.widgets.turn_view import AnswerView, QuestionView

# layouts, far beyond what a few sizes take, and clocks of a busy machine
MANY = 1000


def run(coroutine):
    return asyncio.run(coroutine)


def contents(app):
    return [turn.content for turn in app.chat.session.turns]


def test_an_answer_is_shown_saved_and_has_a_receipt(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await pilot.press(*"Why?", "enter")
            await until(pilot, lambda: contents(app) == ["Why?", ANSWER])
            view = app.chat.query_one(AnswerView)
            assert view.markdown.source == ANSWER
            assert view.markdown.code_blocks() == ["print('blue')"]
            assert "big" in str(view.receipt.content)
            assert "tok/s" in str(view.receipt.content)
            assert app.chat.session.id is not None
            assert [turn.content for turn in app.store.open(app.chat.session.id)[2]] == ["Why?", ANSWER]

    run(go())


def test_lines_are_begun_by_ctrl_j_shift_enter_and_a_backslash(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await pilot.press("a", "ctrl+j", "b", "shift+enter", "c", "\\", "enter", "d")
            assert app.chat.prompt.text == "a\nb\nc\nd"
            await pilot.press("enter")
            await until(pilot, lambda: contents(app)[:1] == ["a\nb\nc\nd"])

    run(go())


def test_the_arrow_keys_walk_through_earlier_prompts_and_back_to_the_draft(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            await say(app, pilot, "two")
            await pilot.press(*"draft", "up")
            assert app.chat.prompt.text == "two"
            await pilot.press("up")
            assert app.chat.prompt.text == "one"
            await pilot.press("up")
            assert app.chat.prompt.text == "one"
            await pilot.press("down", "down")
            assert app.chat.prompt.text == "draft"
        async with chat(tmp_path) as (app, pilot):
            await pilot.press("up")
            assert app.chat.prompt.text == "two"

    run(go())


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
def test_an_answer_can_be_stopped_and_keeps_what_it_said(tmp_path, key):
    async def go():
        async with chat(tmp_path, loader=loader_of(slow_backend())) as (app, pilot):
            app.chat.prompt.put("go on")
            await pilot.press("enter")
            await until(pilot, lambda: len(app.chat.query_one(AnswerView).text) > 8)
            await pilot.press(key)
            await until(pilot, lambda: not app.chat.busy)
            view = app.chat.query_one(AnswerView)
            assert contents(app) == ["go on", view.text]
            assert "stopped" in str(view.receipt.content)
            app.chat.prompt.put("again")
            await pilot.press("enter")
            await until(pilot, lambda: app.chat.state == "answering")

    run(go())


def test_typing_goes_on_while_the_model_answers(tmp_path):
    async def go():
        async with chat(tmp_path, loader=loader_of(slow_backend())) as (app, pilot):
            app.chat.prompt.put("go on")
            await pilot.press("enter")
            await until(pilot, lambda: app.chat.query_one(AnswerView).text)
            await pilot.press(*"next")
            assert app.chat.prompt.text == "next"
            await pilot.press("enter")
            assert app.chat.prompt.text == "next"
            assert "still answering" in toasts(app)

    run(go())


def test_a_question_is_edited_and_sent_again(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            await say(app, pilot, "two")
            await pilot.press("ctrl+up")
            assert app.chat.prompt.text == "two"
            await pilot.press("escape")
            assert app.chat.prompt.text == ""
            app.chat.query(QuestionView).first().focus()
            await pilot.press("e")
            assert app.chat.prompt.text == "one"
            await pilot.press(*" more", "enter")
            await until(pilot, lambda: contents(app) == ["one more", ANSWER])
            assert len(app.chat.query(AnswerView)) == 1
            assert len(app.store.open(app.chat.session.id)[2]) == 2

    run(go())


def test_an_answer_is_made_again(tmp_path):
    async def go():
        backend = FakeBackend(scripted(ANSWER))
        async with chat(tmp_path, loader=loader_of(backend)) as (app, pilot):
            await say(app, pilot, "one")
            seed = backend.seed
            await pilot.press("f5")
            await until(pilot, lambda: not app.chat.busy and len(contents(app)) == 2 and backend.seed != seed)
            assert len(app.chat.query(AnswerView)) == 1
            app.chat.query_one(AnswerView).focus()
            seed = backend.seed
            await pilot.press("r")
            await until(pilot, lambda: not app.chat.busy and backend.seed != seed)
            assert contents(app) == ["one", ANSWER]

    run(go())


def test_what_is_copied(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            await say(app, pilot, "/copy")
            assert app.clipboard == ANSWER
            app.chat.query_one(AnswerView).focus()
            await pilot.press("b")
            assert app.clipboard == "print('blue')"
            app.chat.query_one(QuestionView).focus()
            await pilot.press("c")
            assert app.clipboard == "one"
            await pilot.click(".copy-line")
            assert app.clipboard == "print('blue')"

    run(go())


def test_a_failed_answer_is_a_message_and_the_question_comes_back(tmp_path):
    async def go():
        backend = FakeBackend(scripted(ANSWER))
        backend.errors[0] = ExpertReadError("fake.gguf: layer 3, expert 5: short read")
        async with chat(tmp_path, loader=loader_of(backend)) as (app, pilot):
            await say(app, pilot, "one")
            assert "layer 3, expert 5" in toasts(app)
            assert contents(app) == []
            assert app.chat.prompt.text == "one"
            await pilot.press("enter")
            await until(pilot, lambda: contents(app) == ["one", ANSWER])

    run(go())


def test_an_answer_that_fails_midway_keeps_its_text(tmp_path):
    async def go():
        backend = FakeBackend(scripted(ANSWER))
        backend.errors[6] = RuntimeError("something nobody thought of")
        async with chat(tmp_path, loader=loader_of(backend)) as (app, pilot):
            await say(app, pilot, "one")
            assert "unexpected RuntimeError: something nobody thought of" in toasts(app)
            assert contents(app) == ["one", ANSWER[:6]]
            line = str(app.chat.query_one(AnswerView).receipt.content)
            assert line == "unexpected RuntimeError: something nobody thought of"

    run(go())


def test_a_code_block_that_comes_in_pieces_names_its_whole_language(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "one")
            markdown = app.chat.query_one(AnswerView).markdown
            for piece in ("\n\nMore:\n\n```py", "thon\nx = 1\n", "```\n\nend"):
                markdown.write(piece)
                await markdown.written()
            labels = [str(line.content) for line in markdown.query(".copy-line")]
            assert labels == ["python · copy", "python · copy"]
            # pieces that overtake the drawing are neither lost nor drawn twice
            for piece in "\n\na\n\n- b\n- c\n\n```js\nf()\n```\n":
                markdown.write(piece)
                await asyncio.sleep(0)
            await markdown.written()
            assert markdown.code_blocks() == ["print('blue')", "x = 1", "f()"]
            whole = [type(block) for block in markdown.children]
            await markdown.update(markdown.source)
            assert [type(block) for block in markdown.children] == whole

    run(go())


def test_a_model_that_does_not_load_is_a_message(tmp_path):
    async def go():
        loader = Loader()
        loader.errors["gone"] = ModelNotFoundError("no such model: gone")
        async with chat(tmp_path, reference="gone", loader=loader) as (app, pilot):
            assert "no such model: gone" in toasts(app)
            app.chat.prompt.put("hello")
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, ModelPicker))
            assert app.chat.prompt.text == "hello"

    run(go())


def test_a_setting_that_a_model_refuses_says_how_to_change_it(tmp_path):
    async def go():
        loader = Loader()
        loader.errors["fake"] = UsageError("--ram-budget 1.0 KiB is too small")
        async with chat(tmp_path, loader=loader) as (app, _pilot):
            assert "too small · Ctrl-S changes it, /reload tries again" in toasts(app)

    run(go())


def test_loading_shows_progress_and_can_be_cancelled(tmp_path):
    async def go():
        loader = Loader()
        async with chat(tmp_path, loader=loader) as (app, pilot):
            loader.gate.clear()
            await submit(app, pilot, "/model other")
            await until(pilot, lambda: "60%" in app.chat.query_one("#title").activity)
            await submit(app, pilot, "/set ram_budget 2G")
            assert "after /reload" in toasts(app)
            assert "Esc cancels" in app.chat.query_one("#title").activity
            await pilot.press("escape")
            await until(pilot, lambda: not app.chat.busy)
            assert "cancelled" in toasts(app)
            assert not app.chat.facts

    run(go())


def test_a_question_asked_while_loading_waits_for_the_model(tmp_path):
    async def go():
        loader = Loader()
        async with chat(tmp_path, loader=loader) as (app, pilot):
            loader.gate.clear()
            await submit(app, pilot, "/model other")
            await submit(app, pilot, "early")
            assert contents(app) == []
            loader.gate.set()
            await until(pilot, lambda: contents(app) == ["early", ANSWER])

    run(go())


def test_commands_are_completed(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            shown = app.chat.query_one(CompletionList)
            await pilot.press(*"/re")
            assert [item.shown for item in shown.completions] == [
                "/rename TITLE",
                "/reload",
                "/regenerate",
            ]
            await pilot.press("escape")
            assert not shown.display
            app.chat.prompt.put("/set mo")
            await pilot.pause()
            await pilot.press("tab")
            assert app.chat.prompt.text == "/set mode"
            await pilot.press("space", *"l", "tab")
            assert app.chat.prompt.text == "/set mode little"
            await pilot.press("enter")
            await until(pilot, lambda: app.settings.value("mode") == "little")
            await pilot.press(*"/hel", "down", "up", "enter")
            await until(pilot, lambda: isinstance(app.screen, Help))

    run(go())


def test_an_enter_that_overtakes_the_completions_is_not_lost(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            app.chat.prompt.put("/set mo")
            await pilot.pause()
            assert app.chat.prompt.completing
            app.chat.prompt.put("/set mode little")
            await app.chat.prompt._on_key(events.Key("enter", None))
            app.chat.prompt.insert("typed since")
            await pilot.pause()
            assert app.chat.prompt.text == "typed since"
            await until(pilot, lambda: app.settings.value("mode") == "little")
            app.chat.prompt.put("/model")
            await pilot.pause()
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, ModelPicker))

    run(go())


def test_settings_count_from_the_next_answer_on(tmp_path):
    async def go():
        backend = FakeBackend(scripted(ANSWER))
        async with chat(tmp_path, loader=loader_of(backend)) as (app, pilot):
            await say(app, pilot, "/set mode little")
            await say(app, pilot, "/set temp 0.25")
            await say(app, pilot, "one")
            assert backend.sampling["temp"] == 0.25
            assert "little 1" in backend.log
            await say(app, pilot, "/set temp nonsense")
            assert "must be a number" in toasts(app)
            await say(app, pilot, "/set ram_budget 50%")
            assert "after /reload" in toasts(app)
        loader = Loader()
        async with chat(tmp_path, loader=loader) as (app, _pilot):
            assert str(loader.options[0]["ram_budget"]) == "50%"
            assert app.settings.value("mode") == "little"

    run(go())


def test_quitting_while_generating_is_clean(tmp_path):
    async def go():
        backend = slow_backend()
        async with chat(tmp_path, loader=loader_of(backend)) as (app, pilot):
            app.chat.prompt.put("go on")
            await pilot.press("enter")
            await until(pilot, lambda: app.chat.query_one(AnswerView).text)
            await pilot.resize_terminal(60, 20)
            await pilot.press("ctrl+q")
            await pilot.pause()
        assert app.return_code == 0
        assert backend.closed

    run(go())


def test_a_stuck_engine_does_not_keep_the_program(tmp_path, monkeypatch):
    async def go():
        backend, release = FakeBackend(scripted("abc")), threading.Event()
        stuck = threading.Event()

        def hang():
            stuck.set()
            release.wait()

        backend.on_evaluate = hang
        async with chat(tmp_path, loader=loader_of(backend)) as (app, pilot):
            try:
                app.chat.prompt.put("go on")
                await pilot.press("enter")
                await until(pilot, stuck.is_set)
                await pilot.press(*"typing works")
                assert app.chat.prompt.text == "typing works"
                await pilot.press("ctrl+q")
                assert not app.engine.shut_down(0.1)
            finally:
                release.set()

    run(go())


@pytest.mark.parametrize("key", ["", "f1", "f9"])
def test_sizes_that_come_together_do_not_follow_each_other_for_ever(tmp_path, key):
    """A screen of Textual's sends itself each size that it hears of: two in its queue never ended."""

    async def go():
        async with chat(tmp_path, size=(120, 40)) as (app, pilot):
            await pilot.press(*filter(None, [key]))
            n_layouts, before = 0, app.screen._refresh_layout

            def lay_out(size=None, scroll=False):
                nonlocal n_layouts
                n_layouts += 1
                if n_layouts < MANY:  # without an end nothing else would have its turn
                    before(size, scroll)

            app.screen._refresh_layout = lay_out
            large, small = app.size, Size(80, 24)
            for size in (small, large, small):  # the last one is stale as well
                app.screen.post_message(events.Resize(size, size))
                app.screen.call_later(lambda: None)  # or else the queue would join them
            for _ in range(400):
                await asyncio.sleep(0)
            assert n_layouts < MANY, "each size brings another one"
            assert app.screen.size == app.size == large
            await pilot.resize_terminal(70, 20)
            await until(pilot, lambda: app.screen.size == Size(70, 20))

    run(go())
