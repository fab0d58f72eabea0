"""The TUI's parts without a screen: expert state, store, settings, commands, jobs."""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
import threading

import numpy as np
import pytest
from expert_source import asked

from mobile_gguf.engine.experts import Places
from mobile_gguf.engine.structs import LOADING, RESIDENT
from mobile_gguf.errors import UsageError
from mobile_gguf.tui.commands.jobs import CANCELLED, DONE, FAILED, JobEnded, JobHeard, Jobs
from mobile_gguf.tui.commands.slash import COMMANDS, complete
from mobile_gguf.tui.commands.values import setting_values
from mobile_gguf.tui.engine.expert_state import Cell, ExpertState, aggregate, spans
from mobile_gguf.tui.engine.outbox import Token
from mobile_gguf.tui.store.conversations import ConversationStore, StoreError, Turn
from mobile_gguf.tui.store.settings import Settings
from mobile_gguf.tui.widgets.gauge import sparkline


def test_cells_say_where_experts_are_and_what_they_did():
    state = ExpertState([1, 2], 4, [10, 1000])
    host = np.array([[RESIDENT, RESIDENT, 0, LOADING], [RESIDENT, 0, 0, 0]], dtype=np.uint8)
    device = np.array([[0, RESIDENT, 0, 0], [0, 0, 0, RESIDENT]], dtype=np.uint8)
    state.set_places(Places(host, device))
    assert state.cells().tolist() == [
        [Cell.HOST, Cell.DEVICE, Cell.ABSENT, Cell.LOADING],
        [Cell.HOST, Cell.ABSENT, Cell.ABSENT, Cell.DEVICE],
    ]
    state.next_token(asked((0, 0, False), (0, 1, False), (1, 1, True), n_lost=7))
    assert state.cells().tolist() == [
        [Cell.HIT, Cell.DEVICE_HIT, Cell.ABSENT, Cell.LOADING],
        [Cell.HOST, Cell.MISS, Cell.ABSENT, Cell.DEVICE],
    ]
    state.next_token(asked())
    assert state.cells()[0, 0] == Cell.OLD_HIT
    assert state.cells()[1, 1] == Cell.OLD_MISS
    state.settle()
    assert state.cells()[0, 0] == Cell.HOST
    assert (state.hits[0, 0], state.misses[1, 1], state.n_lost) == (1, 1, 7)
    assert state.counts() == {"device": 2, "host": 3, "loading": 1, "bytes": 1020}


def test_a_cell_of_several_experts_shows_the_event_else_the_majority():
    cells = np.array([[0, 0, 1, 1, 0, 8], [0, 1, 1, 2, 2, 5]], dtype=np.uint8)
    assert aggregate(cells, 1, 3).tolist() == [[Cell.ABSENT, Cell.HOST, Cell.MISS]]
    assert aggregate(cells, 2, 6).tolist() == cells.tolist()
    assert aggregate(cells, 9, 2).tolist() == [[Cell.ABSENT, Cell.MISS], [Cell.HOST, Cell.HIT]]


@pytest.mark.parametrize(("n", "room"), [(128, 40), (30, 28), (5, 80), (1, 1), (48, 0)])
def test_spans_cover_everything_once_and_evenly(n, room):
    found = spans(n, room)
    assert [i for span in found for i in span] == list(range(n))
    assert len(found) <= max(1, room)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_sparkline_is_scaled_to_its_highest_value():
    assert sparkline([0, 7, 3.5], 10) == "▁█▅"
    assert sparkline([0, 0], 10) == "▁▁"
    assert sparkline(range(100), 3) == sparkline([97, 98, 99], 3) == "███"
    assert sparkline([1, 2], 0) == ""


def test_conversations_are_kept_and_searched(tmp_path):
    store = ConversationStore(tmp_path / "deep" / "c.db")
    assert (tmp_path / "deep" / "c.db").stat().st_mode & 0o777 == 0o600
    first = store.create("The sky", "demo")
    store.append(first, 0, Turn("user", "Why is the sky blue?"))
    store.append(first, 1, Turn("assistant", "Rayleigh", "1 big", [Token("Ray", "big", 0.5, 7)], "demo"))
    second = store.create("Bread " * 40, "demo")
    store.append(second, 0, Turn("user", 'bake "bread" AND eat'))
    store.close()
    store = ConversationStore(tmp_path / "deep" / "c.db")
    assert [item.id for item in store.search()] == [second, first]
    assert [item.id for item in store.search("rayl")] == [first]
    assert "[Rayleigh]" in store.search("rayl")[0].snippet
    assert [item.id for item in store.search('"bread" AND')] == [second]
    assert [item.id for item in store.search("the sky")] == [first]
    assert store.search('nothing"*(') == []
    assert len(store.search()[0].title) == 60
    assert store.open(first)[2][1].tokens == [Token("Ray", "big", 0.5, 7)]
    store.append(first, 0, Turn("user", "Why is it green?"))
    assert [turn.content for turn in store.open(first)[2]] == ["Why is it green?"]
    assert store.search("rayl") == []
    assert store.prompts() == ['bake "bread" AND eat', "Why is it green?"]
    store.delete(first)
    with pytest.raises(StoreError, match="deleted"):
        store.open(first)


def test_a_store_that_is_locked_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("mobile_gguf.tui.store.conversations._BUSY_SECONDS", 0.05)
    store = ConversationStore(tmp_path / "c.db")
    other = sqlite3.connect(tmp_path / "c.db")
    other.execute("begin exclusive")
    with pytest.raises(StoreError, match=r"c\.db cannot be used: database is locked"):
        store.create("x", "demo")
    other.rollback()
    other.close()
    assert store.create("x", "demo") == 1


def test_settings_are_read_checked_and_saved(tmp_path):
    path = tmp_path / "conf" / "chat.json"
    settings = Settings(path, {"mode": "little"})
    assert settings.answer_options() == {"mode": "little"}
    assert settings.set("--temp", "0.5") == "temperature"
    assert settings.set("ram-budget", "40%") == "ram_budget"
    assert settings.set("mode", "exact") == "mode"
    with pytest.raises(UsageError, match="top_p is 7"):
        settings.set("top_p", "7")
    with pytest.raises(UsageError, match="unknown option 'colour'"):
        settings.set("colour", "red")
    again = Settings(path)
    assert again.answer_options() == {"temperature": 0.5, "mode": "exact"}
    assert str(again.load_options()["ram_budget"]) == "40%"
    again.set("temperature", "default")
    assert again.text("temperature") == "0.8"


def test_a_bad_setting_costs_only_itself(tmp_path):
    path = tmp_path / "chat.json"
    options = {
        "temperature": "hot", "top_k": "7", "flash_attn": True, "stop": ["a"], "colour": "red",
        "mode": "little", "ram_budget": "40%", "threads": 10_000, "min_p": 0.5,
    }  # fmt: skip
    path.write_text(json.dumps({"options": options, "extra": {"theme": "nord"}, "later": [1]}))
    settings = Settings(path)
    assert settings.answer_options() == {"top_k": 7, "mode": "little", "min_p": 0.5}
    assert {name: str(value) for name, value in settings.load_options().items()} == {"ram_budget": "40%"}
    assert settings.extra == {"theme": "nord"}
    bad = ("temperature", "flash_attn", "stop", "colour", "threads")
    assert "\n" not in settings.problem
    assert all(name in settings.problem for name in bad)
    # what is saved keeps them as they are, but for the one that is set anew
    settings.set("threads", "2")
    saved = json.loads(path.read_text())
    kept = {name: options[name] for name in bad if name != "threads"}
    assert saved["options"] == kept | {
        "top_k": "7", "mode": "little", "ram_budget": "40%", "min_p": "0.5", "threads": "2",
    }  # fmt: skip
    assert (saved["extra"], saved["later"]) == ({"theme": "nord"}, [1])
    again = Settings(path)
    assert again.load_options()["threads"] == 2
    assert "threads" not in again.problem


def test_extra_that_is_none_leaves_the_options(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('{"options": {"top_k": "7"}, "extra": 5}')
    settings = Settings(path)
    assert settings.answer_options() == {"top_k": 7}
    assert "extra is 5" in settings.problem
    settings.save()
    assert json.loads(path.read_text())["extra"] == 5
    settings.extra["theme"] = "nord"
    settings.save()
    assert json.loads(path.read_text()) == {"options": {"top_k": "7"}, "extra": {"theme": "nord"}}


NO_SETTINGS = [b'{"options": {"top_k": "7"', b"[1]", b'{"options": 5}', b"\xff", b"[" * 10**5]


@pytest.mark.parametrize("content", NO_SETTINGS, ids=range(len(NO_SETTINGS)))
def test_a_file_that_is_no_settings_is_moved_aside(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    settings = Settings(path)
    assert settings.problem.startswith(f"{path} cannot be read: ")
    assert path.read_bytes() == content, "reading changes nothing"
    settings.set("top_k", "9")
    assert (tmp_path / "chat.json.unread").read_bytes() == content
    assert Settings(path).answer_options() == {"top_k": 9}
    assert Settings(path).problem == ""


def test_every_command_has_a_method():
    from mobile_gguf.tui.screens.chat import ChatScreen

    assert [c.name for c in COMMANDS if not hasattr(ChatScreen, f"command_{c.action}")] == []


def test_every_binding_has_an_id_and_a_tooltip():
    from mobile_gguf.tui.app import ChatApp
    from mobile_gguf.tui.screens import chat, confirm, conversations, dialog, jobs, map, models, settings
    from mobile_gguf.tui.widgets import prompt, turn_view

    sources = [ChatApp, chat.ChatScreen, confirm.Confirm, conversations.Conversations, dialog.Dialog]
    sources += [jobs.JobsScreen, map.MapScreen, models.ModelPicker, settings.SettingsScreen]
    sources += [prompt.Prompt, turn_view.AnswerView, turn_view.QuestionView]
    bindings = [binding for source in sources for binding in source.__dict__["BINDINGS"]]
    assert len(bindings) > 25
    assert [binding.key for binding in bindings if not (binding.id and binding.tooltip)] == []


def test_completion_goes_word_by_word():
    values = {"/set": setting_values}
    assert [item.line for item in complete("/exp", values)] == ["/export "]
    assert [item.line for item in complete("/set importance h", values)] == ["/set importance head"]
    assert complete("/set mode little", values) == []
    assert complete("no command", values) == []
    assert complete("/new\nline", values) == []


class Heard:
    """Collects what jobs post, and hands it to them as the app does."""

    def __init__(self):
        self.ended = threading.Event()
        self.messages = []

    def __call__(self, message):
        self.messages.append(message)
        if isinstance(message, JobEnded):
            self.ended.set()

    def finish(self, jobs):
        assert self.ended.wait(300)
        for message in self.messages:
            jobs.hear(message) if isinstance(message, JobHeard) else jobs.ended(message)


@pytest.mark.parametrize(
    ("code", "state", "phase"),
    [
        (
            r"print('reading  12%', end='\r'); print('reading  50%'); print('written to x')",
            DONE,
            "written to x",
        ),
        ("import sys; sys.exit('mobile-gguf: error: no such model')", FAILED, "no such model"),
    ],
)
def test_a_job_tells_how_it_goes_and_how_it_ended(code, state, phase):
    heard = Heard()
    jobs = Jobs(heard, [sys.executable, "-c", code])
    job = jobs.start(["pull", "x"])
    assert jobs.running == [job]
    heard.finish(jobs)
    assert (job.state, jobs.running) == (state, [])
    assert job.phase == phase


def test_a_job_is_cancelled_as_ctrl_c_does_it():
    heard = Heard()
    code = (
        "import time\ntry: print('ready 1%', flush=True); time.sleep(600)\n"
        "except KeyboardInterrupt: print('bye')"
    )
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("SIGINT is ignored here, and children inherit that")
    jobs = Jobs(heard, [sys.executable, "-c", code])
    job = jobs.start(["convert", "x"])
    while not heard.messages:
        heard.ended.wait(0.01)
    jobs.cancel(job.id)
    heard.finish(jobs)
    assert job.state == CANCELLED
    assert list(job.lines) == ["bye"]


def test_a_job_that_cannot_be_started_has_failed():
    jobs = Jobs(lambda _message: None, ["/nonexistent/program"])
    job = jobs.start(["pull", "x"])
    assert job.state == FAILED
    assert "cannot be started" in job.phase
