"""Which experts an answer used: the map beside the chat, and tokens coloured by their pass."""

from __future__ import annotations

import asyncio

import pytest
from fake_backend import FakeBackend, scripted
from textual.widgets import Static
from tui_app import ANSWER, Loader, chat, say, until

from mobile_gguf.tui.screens.map import MapScreen
from mobile_gguf.tui.widgets.side_panel import SidePanel
from mobile_gguf.tui.widgets.turn_view import AnswerView


def run(coroutine):
    return asyncio.run(coroutine)


def test_tokens_are_coloured_by_their_pass(tmp_path):
    async def go():
        loader = Loader()
        loader.backends["fake"] = FakeBackend(scripted("abcd", sure=[0.9, 0.1, 0.9]))
        async with chat(tmp_path, loader=loader, given={"mode": "big-little"}) as (app, pilot):
            await say(app, pilot, "one")
            view = app.chat.query_one(AnswerView)
            assert [token.kind for token in view.tokens] == ["big", "little", "fallback", "little", "little"]
            assert view.markdown.display
            await pilot.press("ctrl+t")
            assert view.token_text.display
            assert str(view.token_text.content) == "abcd"
            assert len({str(span.style) for span in view.token_text.content.spans}) == 2
            await pilot.press("ctrl+t")
            assert view.markdown.display

    run(go())


def test_the_map_follows_the_answer(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            state = app.chat.query_one("#experts", SidePanel).state
            await say(app, pilot, "one")
            assert state.hits[0, 1] > 10
            assert state.misses[2, 3] == state.hits[0, 1]
            assert state.counts() == {"device": 0, "host": 16, "loading": 1, "bytes": 1 << 20}
            assert len(app.chat.query_one("#speed").values) == len(ANSWER) + 1

    run(go())


def test_a_hidden_map_costs_nothing(tmp_path):
    async def go():
        async with chat(tmp_path, size=(80, 24)) as (app, pilot):
            panel = app.chat.query_one("#experts", SidePanel)
            assert not panel.display
            await say(app, pilot, "one")
            assert panel.state.hits.sum() == 0
            await pilot.press("ctrl+g")
            assert panel.display
            await say(app, pilot, "two")
            assert panel.state.hits.sum() > 0
            await pilot.resize_terminal(120, 40)
            await pilot.resize_terminal(40, 12)
            await pilot.press("f9")
            assert isinstance(app.screen, MapScreen)
            app.screen._follow()
            await pilot.press("escape")
            assert app.screen is app.chat

    run(go())


def test_a_window_too_low_for_a_map_keeps_its_prompt(tmp_path):
    async def go():
        async with chat(tmp_path, size=(80, 24)) as (app, pilot):
            panel = app.chat.query_one("#experts", SidePanel)
            await pilot.press("ctrl+g")
            assert panel.display
            await pilot.resize_terminal(40, 12)
            await until(pilot, lambda: not panel.display)
            assert app.chat.prompt.region.bottom <= 12
            await pilot.press("ctrl+g")
            assert isinstance(app.screen, MapScreen)
            await pilot.press("escape")
            await pilot.resize_terminal(80, 24)
            await until(pilot, lambda: panel.display)

    run(go())


def test_the_title_and_the_panel_say_how_much_is_in_memory(tmp_path):
    async def go():
        async with chat(tmp_path) as (app, pilot):
            assert "RAM for 50% of experts" in app.chat.query_one("#title").detail
            await say(app, pilot, "one")
            said = str(app.chat.query_one("#residency", Static).content)
            assert said == "experts 16 of 64 in RAM, 1.0 MiB, 1 loading"
            # where the word has no room there is its sign in the map, not half of it
            line = app.chat.query_one("#residency", Static)
            line.styles.width = len(said) - 2
            await until(pilot, lambda: 0 < line.content_size.width < len(said))
            app.chat.query_one(SidePanel).redraw()
            assert str(line.content) == "experts 16 of 64 in RAM, 1.0 MiB, +1"

    run(go())


@pytest.mark.parametrize("size", [(80, 24), (60, 20)])
def test_a_legend_that_needs_lines_breaks_between_its_entries(tmp_path, size):
    async def go():
        async with chat(tmp_path, size=size) as (app, pilot):
            await pilot.press("ctrl+g")
            legend = app.chat.query_one("#legend", Static)
            await until(pilot, lambda: str(legend.content) == "█ hit  X missed\n+ loading  ░ RAM  · disk")

    run(go())
