"""What the screens look like: SVG pictures that a person has looked at.

After a wanted change: ``MOBILE_GGUF_NEW_PICTURES=1 pytest tests/tui/test_tui_pictures.py``, and look at them.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re

import numpy as np
import pytest
from expert_source import asked
from fake_backend import FakeBackend, scripted
from places import DATA
from textual.content import Content
from textual.notifications import Notification
from textual.widgets import Input, TextArea
from tui_app import Loader, chat, until

from mobile_gguf.api.model import backend_of
from mobile_gguf.engine.structs import RESIDENT
from mobile_gguf.errors import ExpertReadError
from mobile_gguf.tui import app as app_module
from mobile_gguf.tui.screens import conversations
from mobile_gguf.tui.screens import models as picker
from mobile_gguf.tui.store.models import Candidate, Fit
from mobile_gguf.tui.widgets.side_panel import SidePanel
from mobile_gguf.tui.widgets.turn_view import AnswerView

PICTURES = DATA / "tui"
VERSIONS = {"textual": "8.2.8", "rich": "15.0.0"}
TEXT = "It is blue because **air scatters** short waves:\n\n```python\nprint(1 / 4)\n```\n\n- sunset\n"
# How many times the screen is looked at before it counts as different.
PATIENCE = 300
SMALL, LARGE = (80, 24), (120, 40)

pytestmark = pytest.mark.skipif(
    any(importlib.metadata.version(name) != wanted for name, wanted in VERSIONS.items()),
    reason=f"the pictures are of {VERSIONS}",
)


async def nothing(_app, _pilot):
    """The chat as it begins."""


async def answered(app, pilot):
    """A question and its answer."""
    app.chat.prompt.put("Why is the sky blue?")
    await pilot.press("enter")
    await until(pilot, lambda: not app.chat.busy and len(app.chat.session.turns) == 2)
    # times differ from run to run
    view = app.chat.query_one(AnswerView)
    view.finish("73 big | 75% hits | 108.0 KiB read | 54 ms stalled | 21.3 tok/s")
    for gauge in app.chat.query("Gauge"):
        gauge.clear()
        gauge.add([float(i % 7) for i in range(40)])
    app.chat.query_one("#experts", SidePanel).set_rate(21.3)


async def with_map(app, pilot):
    await answered(app, pilot)
    await pilot.press("ctrl+g")
    await until(pilot, lambda: app.chat.query_one("#experts").display)


async def with_device(app, pilot):
    await answered(app, pilot)
    panel = app.chat.query_one("#experts", SidePanel)
    device = np.zeros_like(panel.state.host)
    device[1, 2:9] = RESIDENT
    backend_of(app.engine._model).expert_source.device_codes = device
    panel.state.set_places(app.engine.places())
    panel.state.next_token(asked((1, 3, False), (0, 0, False), (2, 12, True)))
    panel.redraw()


async def coloured(app, pilot):
    app.settings.set("mode", "big-little")
    await answered(app, pilot)
    await pilot.press("ctrl+t")
    app.clear_notifications()


async def completing(app, pilot):
    app.chat.prompt.put("/se")
    await until(pilot, lambda: app.chat.query_one("#completions").display)


async def helped(_app, pilot):
    await pilot.press("f1")


async def settings(_app, pilot):
    await pilot.press("ctrl+s")


async def found(app, pilot):
    await answered(app, pilot)
    await pilot.press("ctrl+r", *"sky")
    await until(pilot, lambda: app.screen.query_one(Input).value == "sky")


async def models(app, pilot):
    await pilot.press("ctrl+o")
    await until(pilot, lambda: len(app.screen.fits) == 2)


async def failed(app, pilot):
    backend = backend_of(app.engine._model)
    backend.errors[backend.n_evaluations] = ExpertReadError("fake.gguf: layer 3, expert 5: short read")
    app.chat.prompt.put("Why?")
    await pilot.press("enter")
    await until(pilot, lambda: not app.chat.busy and app.chat._answer_id == 1)


SCENES = [
    ("begin", nothing, SMALL),
    ("answer", answered, SMALL),
    ("answer", answered, LARGE),
    ("map", with_map, SMALL),
    ("device", with_device, LARGE),
    ("tokens", coloured, SMALL),
    ("completion", completing, SMALL),
    ("help", helped, LARGE),
    ("settings", settings, SMALL),
    ("found", found, SMALL),
    ("models", models, LARGE),
    ("failed", failed, SMALL),
    ("nocolor", with_map, SMALL),
]


@pytest.mark.parametrize(
    ("name", "scene", "size"), SCENES, ids=lambda value: getattr(value, "__name__", None)
)
def test_picture(name, scene, size, tmp_path, monkeypatch):
    monkeypatch.setattr(
        app_module,
        "candidates",
        lambda: [Candidate("demo", None, 164 << 20), Candidate("qwen3", None, 18 << 30)],
    )
    monkeypatch.setattr(picker, "fit_of", lambda *_: Fit("moe", "128 x 48, top-8", "25% of 17 GiB in RAM"))
    # what depends on the time of day or on how long something took
    monkeypatch.setattr(
        conversations, "_row", lambda _item: Content("Why is the sky blue?  2026-01-01 00:00  2 turns")
    )
    monkeypatch.setattr(Notification, "time_left", 3600.0)
    for editor in (Input, TextArea):
        monkeypatch.setattr(editor.cursor_blink, "_default", False)
    if name == "nocolor":
        monkeypatch.setenv("NO_COLOR", "1")
    picture = PICTURES / f"{name}-{size[0]}x{size[1]}.svg"
    loader = Loader()
    loader.backends["fake"] = FakeBackend(scripted(TEXT, sure=[0.9, 0.1, 0.9, 0.9] * 12))

    async def draw():
        shown = name == "failed"
        async with chat(tmp_path, size=size, loader=loader, notifications=shown) as (app, pilot):
            app.animation_level = "none"
            await scene(app, pilot)
            if "MOBILE_GGUF_NEW_PICTURES" in os.environ:
                await pilot.pause(2)
                picture.parent.mkdir(exist_ok=True)
                picture.write_text(exported(app), encoding="utf-8")
            wanted = picture.read_text(encoding="utf-8")
            # Layout and repaints come when the event loop has the time: the screen must become the
            # picture, and stay it.
            drawn = ""
            for _ in range(PATIENCE):
                drawn = exported(app)
                if drawn == wanted:
                    await pilot.pause()
                    if (drawn := exported(app)) == wanted:
                        return
                await pilot.pause(0.02)
            (tmp_path / picture.name).write_text(drawn, encoding="utf-8")
            pytest.fail(f"{picture.name} looks different now: {tmp_path / picture.name}")

    asyncio.run(draw())


def exported(app):
    """The screen as SVG, without what differs between two drawings of the same screen."""
    # the random-looking names hang on the text, which is compared anyway
    drawn = re.sub(r"terminal-\d+", "terminal", app.export_screenshot())
    return re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)
