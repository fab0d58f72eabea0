"""A ChatApp over scripted models, and how tests wait for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from expert_source import ScriptedSource
from fake_backend import FakeBackend, fake_info, scripted
from textual.pilot import Pilot

from mobile_gguf.api.model import Model
from mobile_gguf.engine.structs import LOADING, RESIDENT
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.tui.app import ChatApp
from mobile_gguf.tui.store.settings import Settings

ANSWER = "It **scatters**.\n\n```python\nprint('blue')\n```\n\nYes."


class RoutingSource(ScriptedSource):
    """Every look at it while watched finds the same asked for: two hits and a miss."""

    def __init__(self) -> None:
        info = fake_info()
        super().__init__(info.n_layer, info.n_expert, size=1 << 20)
        self.host_codes[:, :4] = RESIDENT
        self.host_codes[3, 9] = LOADING

    def read(self, since: int, room: Any) -> tuple[int, int, int]:
        if len(room):
            step = len(self.entries)
            self.add((step, 0, 1, False), (step, 1, 2, False), (step, 2, 3, True))
        return super().read(since, room)


class Loader:
    """Stands in for ``load``: scripted models by reference; remembers the options it was given."""

    def __init__(self) -> None:
        self.backends: dict[str, FakeBackend] = {}
        self.errors: dict[str, BaseException] = {}
        self.options: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.polls = 0

    def find(self, reference: str, _progress: Any = None) -> None:
        """Stands in for the look at a file before its load: ``errors`` of names that begin with "no"."""
        if reference.startswith("no") and reference in self.errors:
            raise self.errors[reference]

    def __call__(self, reference: str, *, progress: Callable[[str, float], None], **options: Any) -> Model:
        self.options.append(options)
        progress("loading", 0.5)
        while not self.gate.wait(0.01):
            self.polls += 1
            progress("loading", 0.6)
        if reference in self.errors:
            raise self.errors[reference]
        backend = self.backends.setdefault(reference, FakeBackend(scripted(ANSWER)))
        backend.closed = False
        backend.expert_source = RoutingSource()
        return Model(backend, fake_info(), make_options(LoadOptions, options))  # type: ignore[arg-type]


def slow_backend(text: str = "abc " * 200) -> FakeBackend:
    """A model that takes its time and never ends by itself."""
    backend = FakeBackend(scripted(text, end=False), n_ctx=1 << 20)
    backend.on_evaluate = lambda: time.sleep(0.1)
    return backend


def loader_of(backend: FakeBackend) -> Loader:
    """A loader that has it under the name of the chat's model."""
    loader = Loader()
    loader.backends["fake"] = backend
    return loader


@asynccontextmanager
async def chat(
    tmp_path: Path,
    *,
    reference: str = "fake",
    size: tuple[int, int] = (120, 40),
    loader: Loader | None = None,
    given: dict[str, Any] | None = None,
    notifications: bool = False,
    **more: Any,
) -> AsyncIterator[tuple[Any, Pilot[int]]]:
    """A running app with the scripted model loaded; ended as the program ends it."""
    loader = loader or Loader()
    app = ChatApp(
        reference,
        settings=Settings(tmp_path / "chat.json", given),
        store_path=tmp_path / "conversations.db",
        loader=loader,
        finder=loader.find,
        **more,
    )

    async def quiet(*_seconds: float) -> None:
        await _until_quiet(app)

    with (
        patch("textual.app.wait_for_idle", quiet),
        patch("textual.pilot.wait_for_idle", quiet),
        patch("mobile_gguf.tui.app._PATIENCE_SECONDS", 300.0),
        # a machine that does much else comes to look at them late
        patch("textual.notifications.Notification.has_expired", False),
        patch("mobile_gguf.tui.app.ChatApp._forget_quit", lambda _app: None),
    ):
        try:
            async with app.run_test(size=size, notifications=notifications) as pilot:
                if reference:
                    await until(pilot, lambda: not app.chat.busy)
                yield app, pilot
        finally:
            assert app.close()


async def _until_quiet(app: ChatApp) -> None:
    """Wait until no widget has a message left to handle.

    Textual's own pilot waits until its process uses little CPU, which one that others keep from the CPU does
    as well. Messages go on from widget to widget in steps of the event loop: after many steps without any,
    what was pressed has had its effect.
    """
    still = 0
    for _ in range(20_000):
        await asyncio.sleep(0)
        pumps = [app, *(node for screen in app.screen_stack for node in screen.walk_children(with_self=True))]
        still = 0 if any(pump.message_queue_size for pump in pumps) else still + 1
        if still == 40:
            return


async def until(pilot: Pilot[int], true: Callable[[], Any], seconds: float = 300.0) -> None:
    """Let the app run until a condition holds; fails if it never does."""
    for _ in range(int(seconds / 0.02)):
        await pilot.pause(0.02)
        if true():
            await pilot.pause()
            return
    raise AssertionError("it never came true")


async def submit(app: ChatApp, pilot: Pilot[int], text: str) -> None:
    """Put a line into the prompt and send it."""
    app.chat.prompt.put(text)
    await pilot.pause()
    app.chat.prompt.action_submit()
    await pilot.pause()


async def say(app: ChatApp, pilot: Pilot[int], text: str) -> None:
    """Send a line and wait for the answer if there is one."""
    await submit(app, pilot, text)
    await until(pilot, lambda: not app.chat.busy)


def toasts(app: ChatApp) -> str:
    """The texts of all notifications on the screen."""
    return "\n".join(item.message for item in app._notifications)
