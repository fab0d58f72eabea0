"""What the screens look like: SVG pictures that a person has looked at.

After a wanted change: ``MOBILE_GGUF_NEW_PICTURES=1 pytest tests/test_tui_pictures.py``, and look at them.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
from pathlib import Path

import numpy as np
import pytest
from fake_backend import FakeBackend, scripted
from textual.widgets import Input, OptionList
from tui_app import Loader, chat, until

from mobile_gguf.binding import RESIDENT
from mobile_gguf.errors import ExpertReadError
from mobile_gguf.tui.expert_state import Routed
from mobile_gguf.tui.models import Candidate, Fit
from mobile_gguf.tui.screens import models as picker
from mobile_gguf.tui.widgets.side_panel import SidePanel
from mobile_gguf.tui.widgets.turn_view import AnswerView

PICTURES = Path(__file__).parent / "data" / "tui"
VERSIONS = {"textual": "8.2.8", "rich": "15.0.0"}
TEXT = "It is blue because **air scatters** short waves:\n\n```python\nprint(1 / 4)\n```\n\n- sunset\n"
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
        gauge.values.clear()
        gauge.add([float(i % 7) for i in range(40)])


async def with_map(app, pilot):
    await answered(app, pilot)
    await pilot.press("ctrl+g")


async def with_device(app, pilot):
    await answered(app, pilot)
    panel = app.chat.query_one("#experts", SidePanel)
    device = np.zeros_like(panel.state.host)
    device[1, 2:9] = RESIDENT
    panel.state.set_residency(panel.state.host, device)
    panel.state.next_token([Routed(1, 3, True), Routed(0, 0, True), Routed(2, 12, False)])
    app.engine._watch.device = device
    panel.redraw()


async def coloured(app, pilot):
    app.settings.set("mode", "big-little")
    await answered(app, pilot)
    await pilot.press("ctrl+t")
    app.clear_notifications()


async def completing(app, pilot):
    app.chat.prompt.put("/se")
    await pilot.pause()


async def helped(_app, pilot):
    await pilot.press("f1")


async def settings(_app, pilot):
    await pilot.press("ctrl+s")


async def found(app, pilot):
    await answered(app, pilot)
    await pilot.press("ctrl+r", *"sky")
    options = app.screen.query_one(OptionList)
    for at, _item in enumerate(app.screen.found):
        options.replace_option_prompt_at_index(at, "Why is the sky blue?  2026-01-01 00:00  2 turns")


async def models(app, pilot):
    await pilot.press("ctrl+o")
    await until(pilot, lambda: len(app.screen.fits) == 2)


async def failed(app, pilot):
    backend = app.engine._model.llama
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
        picker, "candidates", lambda: [Candidate("demo", None, 164 << 20), Candidate("qwen3", None, 18 << 30)]
    )
    monkeypatch.setattr(picker, "fit_of", lambda *_: Fit("moe", "128 x 48, top-8", "25% of 17 GiB in RAM"))
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")
    if name == "nocolor":
        monkeypatch.setenv("NO_COLOR", "1")
    loader = Loader()
    loader.backends["fake"] = FakeBackend(scripted(TEXT, sure=[0.9, 0.1, 0.9, 0.9] * 12))

    async def draw():
        shown = name == "failed"
        async with chat(tmp_path, size=size, loader=loader, notifications=shown) as (app, pilot):
            app.chat.prompt.cursor_blink = False
            await scene(app, pilot)
            for box in app.screen.query(Input):
                box.cursor_blink = False
            await pilot.pause(0.3)
            return app.export_screenshot()

    drawn = asyncio.run(draw())
    # the picture's random-looking names hang on its text, which is compared anyway
    drawn = re.sub(r"terminal-\d+", "terminal", drawn)
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)
    picture = PICTURES / f"{name}-{size[0]}x{size[1]}.svg"
    if "MOBILE_GGUF_NEW_PICTURES" in os.environ:
        picture.parent.mkdir(exist_ok=True)
        picture.write_text(drawn, encoding="utf-8")
    if drawn != picture.read_text(encoding="utf-8"):
        (tmp_path / picture.name).write_text(drawn, encoding="utf-8")
        pytest.fail(f"{picture.name} looks different now: {tmp_path / picture.name}")
