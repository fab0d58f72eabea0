"""Background jobs in the TUI: progress, cancelling, failing, chatting meanwhile, and quitting."""

from __future__ import annotations

import asyncio
import sys

import pytest
from textual.widgets import OptionList, Static
from tui_app import ANSWER, chat, say, submit, toasts, until

from mobile_gguf.tui.commands.jobs import CANCELLED, DONE, FAILED
from mobile_gguf.tui.screens.jobs import JobsScreen

# A job that says how far it is, then waits for its standing file to go or for Ctrl-C.
JOB = """
import pathlib, sys, time
print('reading  40%', end='\\r', flush=True)
if sys.argv[1] == 'pull' and sys.argv[2] == 'gone':
    sys.exit('mobile-gguf: error: no such model: gone')
gate = pathlib.Path(sys.argv[2])
while gate.exists():
    time.sleep(0.02)
print('written to x', flush=True)
"""


def run(coroutine):
    return asyncio.run(coroutine)


def contents(app):
    return [turn.content for turn in app.chat.session.turns]


@pytest.fixture
def gate(tmp_path):
    path = tmp_path / "gate"
    path.touch()
    return path


def with_jobs(tmp_path, **more):
    return chat(tmp_path, job_program=[sys.executable, "-c", JOB], **more)


@pytest.mark.parametrize("verb", ["pull", "convert", "calibrate"])
def test_a_job_runs_while_one_chats(tmp_path, gate, verb):
    async def go():
        async with with_jobs(tmp_path) as (app, pilot):
            await submit(app, pilot, f"/{verb} '{gate}'")
            job = app.jobs.jobs[1]
            assert job.argv == [verb, str(gate)]
            await until(pilot, lambda: job.share == 0.4)
            assert "1 job" in app.chat.query_one("#title").detail
            await say(app, pilot, "Why?")
            assert contents(app) == ["Why?", ANSWER]
            await pilot.press("f8")
            assert isinstance(app.screen, JobsScreen)
            row = str(app.screen.query_one(OptionList).get_option_at_index(0).prompt)
            assert "running 40%" in row
            assert verb in row
            gate.unlink()
            await until(pilot, lambda: job.state == DONE)
            assert "written to x" in toasts(app)
            await until(
                pilot,
                lambda: "done" in str(app.screen.query_one(OptionList).get_option_at_index(0).prompt),
            )
            assert "written to x" in str(app.screen.query_one("#job-lines", Static).content)
            await pilot.press("escape")
            assert "job" not in app.chat.query_one("#title").detail

    run(go())


@pytest.mark.parametrize("key", ["x", "delete"])
def test_a_job_is_cancelled(tmp_path, gate, key):
    async def go():
        async with with_jobs(tmp_path) as (app, pilot):
            await submit(app, pilot, f"/pull '{gate}'")
            job = app.jobs.jobs[1]
            await until(pilot, lambda: job.share == 0.4)
            await submit(app, pilot, "/jobs")
            await pilot.press(key)
            await until(pilot, lambda: job.state == CANCELLED)
            assert not app.jobs.running
            assert "cancelled" in toasts(app)

    run(go())


def test_a_job_that_fails_is_a_message(tmp_path):
    async def go():
        async with with_jobs(tmp_path) as (app, pilot):
            await submit(app, pilot, "/pull gone")
            await until(pilot, lambda: app.jobs.jobs[1].state == FAILED)
            assert "no such model: gone" in toasts(app)
            await submit(app, pilot, "/pull")
            assert "/pull needs a model" in toasts(app)
            await submit(app, pilot, "/convert 'half")
            assert "cannot read the command" in toasts(app)

    run(go())


def test_quitting_while_a_job_runs_asks_once_and_ends_it(tmp_path, gate):
    async def go():
        async with with_jobs(tmp_path) as (app, pilot):
            await submit(app, pilot, f"/pull '{gate}'")
            child = app.jobs._children[1]
            await until(pilot, lambda: app.jobs.jobs[1].share == 0.4)
            await pilot.press("ctrl+q")
            assert "Ctrl-Q again" in toasts(app)
            assert child.poll() is None
            await pilot.press("ctrl+q")
        assert app.return_code == 0
        assert child.poll() is not None

    run(go())
