"""Another model while one answers, two chats at once, and words that are more than they seem."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_backend import FakeBackend, scripted
from tui_app import ANSWER, Loader, chat, say, submit, toasts, until

from mobile_gguf.api.stats import stats_lines
from mobile_gguf.errors import ModelNotFoundError
from mobile_gguf.files.paths import models_dir
from mobile_gguf.tui.screens.chat_state import ANSWERING, LOADING
from mobile_gguf.tui.store.conversations import ConversationStore, Turn, local_time
from mobile_gguf.tui.store.session import Session


def contents(app):
    return [turn.content for turn in app.chat.session.turns]


def endless(gate: threading.Event) -> FakeBackend:
    """A model that goes on until it is stopped: its context lasts for a day."""
    backend = FakeBackend(scripted("word ", end=False), n_ctx=1 << 20)
    backend.on_evaluate = lambda: gate.wait(0.1)  # type: ignore[assignment]
    return backend


def test_another_model_ends_the_answer_and_escape_only_its_load(tmp_path):
    async def go():
        loader = Loader()
        loader.backends["fake"] = endless(threading.Event())
        async with chat(tmp_path, loader=loader) as (app, pilot):
            await submit(app, pilot, "go on")
            await until(pilot, lambda: app.chat._answer is not None and len(app.chat._answer.tokens) > 5)
            loader.gate.clear()
            await submit(app, pilot, "/model other")
            await until(pilot, lambda: app.chat.state == LOADING and len(contents(app)) == 2)
            assert "word" in contents(app)[1]  # the words so far are kept
            await until(pilot, lambda: "60%" in app.chat.query_one("#title").activity)
            await pilot.press("escape")
            await until(pilot, lambda: not app.chat.busy)
            assert "/model fake loads the last one again" in toasts(app)
            loader.gate.set()
            await say(app, pilot, "/model other")
            await until(pilot, lambda: app.chat.reference == "other")

    asyncio.run(go())


def test_a_wrong_name_costs_neither_the_answer_nor_the_model(tmp_path):
    async def go():
        loader = Loader()
        loader.backends["fake"] = endless(threading.Event())
        loader.errors["no.gguf"] = ModelNotFoundError("no such model: no.gguf")
        async with chat(tmp_path, loader=loader) as (app, pilot):
            await submit(app, pilot, "go on")
            await submit(app, pilot, "/model no.gguf")
            await until(pilot, lambda: "no such model: no.gguf · Fake MoE stays" in toasts(app))
            assert app.chat.state == ANSWERING
            await pilot.press("escape")
            await until(pilot, lambda: not app.chat.busy)
            await submit(app, pilot, "/model no.gguf")
            await until(pilot, lambda: not app.chat.busy)
            assert app.chat.facts
            assert not loader.backends["fake"].closed

    asyncio.run(go())


def test_a_load_in_place_of_a_load_keeps_the_question_that_waits(tmp_path):
    async def go():
        loader = Loader()
        async with chat(tmp_path, loader=loader) as (app, pilot):
            loader.gate.clear()
            await submit(app, pilot, "/model other")
            await until(pilot, lambda: "60%" in app.chat.query_one("#title").activity)
            await submit(app, pilot, "early")
            await submit(app, pilot, "/model third")
            await until(pilot, lambda: app.chat._wanted == "third")
            assert app.chat.state == LOADING
            loader.gate.set()
            await until(pilot, lambda: contents(app) == ["early", ANSWER])
            assert app.chat.reference == "third"

    asyncio.run(go())


def test_a_wrong_name_while_one_loads_leaves_that_load(tmp_path):
    async def go():
        loader = Loader()
        loader.errors["no.gguf"] = ModelNotFoundError("no such model: no.gguf")
        async with chat(tmp_path, loader=loader) as (app, pilot):
            loader.gate.clear()
            await submit(app, pilot, "/model other")
            await until(pilot, lambda: "60%" in app.chat.query_one("#title").activity)
            await submit(app, pilot, "/model no.gguf")
            await until(pilot, lambda: "no such model" in toasts(app))
            assert app.chat.state == LOADING
            loader.gate.set()
            await until(pilot, lambda: app.chat.reference == "other")

    asyncio.run(go())


@pytest.mark.parametrize(
    "typed", ["/x[/red]", "/system be [/bold]", "/rename [/b]", "/set temperature [/x]", "/model Q[/4].gguf"]
)
def test_brackets_are_shown_and_not_obeyed(tmp_path, typed):
    async def go():
        loader = Loader()
        loader.errors["Q[/4].gguf"] = ModelNotFoundError("no such model: Q[/4].gguf")
        async with chat(tmp_path, loader=loader, notifications=True) as (app, pilot):
            await say(app, pilot, typed)
            await pilot.pause(0.2)
            assert "[/" in toasts(app)

    asyncio.run(go())


def test_half_of_a_surrogate_pair_is_a_question_mark(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            await say(app, pilot, "odd \ud83d text")
            assert contents(app) == ["odd ? text", ANSWER]
            await say(app, pilot, "/rename \udce9")
            assert app.store.search()[0].title == "?"

    asyncio.run(go())


def test_two_chats_that_begin_together_both_save(tmp_path):
    for at in range(5):
        path = tmp_path / str(at) / "conversations.db"
        begin = threading.Barrier(4)

        def open_one(path=path, begin=begin):
            begin.wait()
            store = ConversationStore(path)
            store.append(store.create("a", "m"), 0, Turn("user", "hello"))
            store.close()

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(open_one) for _ in range(4)]:
                done.result()
        store = ConversationStore(path)
        assert len(store.search()) == 4
        store.close()


def test_the_words_so_far_are_saved_and_replaced(tmp_path):
    store = ConversationStore(tmp_path / "c.db")
    session = Session(store)
    session.ask("question", "m")
    session.draft("half of", [], "m")
    assert [turn.content for turn in store.open(1)[2]] == ["question", "half of"]
    assert len(session.turns) == 1
    session.answer("half of it", "receipt", [], "m")
    assert [(turn.content, turn.receipt) for turn in store.open(1)[2]][1] == ("half of it", "receipt")


def test_a_question_that_is_taken_back_gives_no_title_and_leaves_nothing(tmp_path):
    store = ConversationStore(tmp_path / "c.db")
    session = Session(store)
    session.ask("too long " * 9, "m")
    session.cut(0)
    assert store.search() == []
    session.ask("shorter", "m")
    assert [(one.title, one.n_turns) for one in store.search()] == [("shorter", 1)]
    session.open(store.search()[0].id)
    session.cut(0)  # the first question is edited
    session.ask("edited", "m")
    assert [(one.title, one.n_turns) for one in store.search()] == [("edited", 1)]
    session.rename("mine")
    session.cut(0)
    session.ask("another", "m")
    session.open(store.search()[0].id)
    session.cut(0)
    assert [(one.title, one.n_turns) for one in store.search()] == [("mine", 0)], "a name of one's own stays"


def test_what_is_taken_back_while_nothing_can_be_saved(tmp_path):
    store, told = ConversationStore(tmp_path / "c.db"), []
    session = Session(store, told.append)
    store._db.execute("pragma query_only = 1")
    session.ask("one", "m")
    session.cut(0)
    store._db.execute("pragma query_only = 0")
    session.set_system("S")
    assert store.search() == []
    session.ask("two", "m")
    assert told[-1] is None
    assert [(one.title, one.n_turns) for one in store.search()] == [("two", 1)]


def test_what_could_not_be_saved_is_saved_later(tmp_path):
    store, told = ConversationStore(tmp_path / "c.db"), []
    session = Session(store, told.append)
    session.ask("one", "m")
    store._db.execute("pragma query_only = 1")
    session.answer("first", "", [], "m")
    assert "cannot be used" in str(told[-1])
    assert not told[-1].broken
    store._db.execute("pragma query_only = 0")
    session.ask("two", "m")
    assert told[-1] is None
    assert [turn.content for turn in store.open(1)[2]] == ["one", "first", "two"]


def test_times_are_those_of_the_users_clock(monkeypatch):
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert local_time("2026-11-28T14:02:00.000+00:00") == "2026-11-28 23:02"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_stats_say_the_mode_of_the_last_answer(tmp_path):
    async def go():
        async with chat(tmp_path, given={"mode": "big-little"}) as (app, pilot):
            await say(app, pilot, "one")
            lines = stats_lines(app.chat.facts)
            assert any(line.split() == ["mode", "big-little"] for line in lines)
            assert not any("{" in line for line in lines)
            # names do not run into their values
            facts = [line for line in stats_lines({"store": {"little_pass_uploads_time_ratio": 1.5}}) if line]
            assert facts == ["store:", "  little pass uploads time ratio  1.5"]
            gauge = app.chat.query_one("#speed")
            receipt = app.chat.query_one("AnswerView .receipt")
            assert f"{gauge.latest:.1f} tok/s" in str(receipt.content)

    asyncio.run(go())


def test_a_full_context_leaves_out_the_oldest_turns_and_says_so(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            app.chat.session.turns = [
                Turn(role, f"{role} {at}") for at in range(30) for role in ("user", "assistant")
            ]
            await say(app, pilot, "and now?")
            assert contents(app)[-2:] == ["and now?", ANSWER]
            assert len(contents(app)) == 62  # the screen forgets nothing
            receipt = app.chat.query("AnswerView").last().receipt
            assert "turns were left out" in str(receipt.content)
            await say(app, pilot, "too long " * 100)
            assert "/set n_ctx and /reload make room, /new begins again" in toasts(app)
            assert app.chat.prompt.text.startswith("too long")
            assert "context_full" not in toasts(app)
            await say(app, pilot, "/set context_full stop")
            await say(app, pilot, "too long " * 100)
            assert "/set context_full trim leaves out the oldest turns, /set n_ctx" in toasts(app)

    asyncio.run(go())


def test_an_answer_at_the_end_of_the_context_names_the_way_out(tmp_path):
    async def go():
        loader = Loader()
        loader.backends["fake"] = FakeBackend(scripted("word ", end=False))
        async with chat(tmp_path, loader=loader) as (app, pilot):
            await say(app, pilot, "go on")
            receipt = str(app.chat.query_one("AnswerView").receipt.content)
            assert "the context of 512 is full; /set n_ctx 1024 and /reload, or /new" in receipt
            await say(app, pilot, "/set max_tokens 3")
            await say(app, pilot, "/regenerate")
            receipt = str(app.chat.query_one("AnswerView").receipt.content)
            assert receipt.endswith("cut at max_tokens")

    asyncio.run(go())


def test_the_palette_has_the_models_whose_names_are_no_markup(tmp_path):
    async def go():
        (models_dir() / "Q[").mkdir(parents=True)
        (models_dir() / "Q[" / "4][red].gguf").write_text("")  # its name is Q[/4][red]
        (models_dir() / "good.gguf").write_text("")
        async with chat(tmp_path) as (app, _pilot):
            titles = [command.title for command in app.get_system_commands(app.screen)]
            assert "/model good" in titles
            # Textual takes the titles for markup; the picker and /model have all names
            assert not any("[" in title for title in titles)
            assert "Q[/4][red]" in app.model_names()

    asyncio.run(go())
