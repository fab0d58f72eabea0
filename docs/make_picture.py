"""Writes docs/tui.svg, the README's picture: the real chat with the demo model, in the middle of an answer.

python docs/make_picture.py
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobile_gguf.tui.app import ChatApp
from mobile_gguf.tui.store.settings import Settings
from mobile_gguf.tui.widgets.turn_view import AnswerView

OUT = Path(__file__).with_name("tui.svg")
SIZE = (120, 40)
QUESTIONS = ("Why is the sky blue?", "Write a short poem about the sea.")
ANSWERED_AT = 45  # tokens of the last answer


async def picture() -> str:
    """The screen as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"ram_budget": "60%", "mode": "big-little", "temperature": 0.0, "max_tokens": 80}
        settings = Settings(Path(folder) / "chat.json", options)
        app = ChatApp("demo", settings=settings, store_path=Path(folder) / "conversations.db")
        async with app.run_test(size=SIZE) as pilot:
            await _until(pilot, lambda: app.chat.model_name and not app.chat.busy)
            for question in QUESTIONS:
                await _until(pilot, lambda: not app.chat.busy)
                app.chat.prompt.text = question
                await pilot.press("enter")
                await _until(pilot, lambda: app.chat.busy)
            await _until(pilot, lambda: len(app.chat.query(AnswerView).last().tokens) >= ANSWERED_AT)
            svg = app.export_screenshot(title="mobile-gguf")
        app.close()
        return svg


async def _until(pilot: Any, condition: Callable[[], Any]) -> None:
    for _ in range(6000):
        if condition():
            return
        await pilot.pause(0.05)
    raise SystemExit("the chat did not get there")


if __name__ == "__main__":
    OUT.write_text(asyncio.run(picture()), encoding="utf-8")
