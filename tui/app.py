"""The application: what all screens share, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from textual import on
from textual.app import App, SuspendNotSupported, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from mobile_gguf.api.attached_files import folded
from mobile_gguf.api.last_conversation import LAST
from mobile_gguf.api.model import Model, check_model, load
from mobile_gguf.errors import MobileError
from mobile_gguf.remote.connection import Server
from mobile_gguf.remote.model import RemoteModel, attach, listed

from .commands.jobs import FAILED, Job, JobEnded, JobHeard, Jobs
from .commands.slash import COMMANDS
from .engine.thread import EngineThread
from .screens.chat import ChatScreen
from .screens.map import MapScreen
from .store.conversations import ConversationStore, StoreError, move_aside, storable
from .store.models import Candidate, candidates, names
from .store.settings import Settings
from .terminal import stop_as_a_shell_does

DEFAULT_THEME = "textual-dark"
# How long the engine may take to come back when the program ends.
_PATIENCE_SECONDS = 5.0
_HUNG_UP_SECONDS = 2.0  # a system that shuts down kills what takes longer


def _attaching(server: Server) -> Callable[..., RemoteModel]:
    """What loads, of a server: the address stands for the model that it has."""

    def load_from(reference: str, **_options: Any) -> RemoteModel:
        return attach(server, None if reference == server.url else reference)

    return load_from


def _finding(server: Server) -> Callable[..., object]:
    """What looks whether a model is there, of a server."""

    def find(reference: str, _progress: Any = None) -> None:
        attach(server, None if reference == server.url else reference)

    return find


class ChatApp(App[int]):
    """``mobile-gguf chat``. The parts can be given, for tests."""

    CSS_PATH = "styles.tcss"
    TITLE = "mobile-gguf"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help", id="app.help", tooltip="Keys and commands", priority=True),
        Binding("ctrl+q", "quit", "Quit", id="app.quit", tooltip="Leave", priority=True),
        Binding(
            "ctrl+c",
            "interrupt",
            "Stop",
            id="app.interrupt",
            tooltip="End the answer; copy what is selected; clear the prompt",
            show=False,
            priority=True,
        ),
        Binding(
            "ctrl+p",
            "command_palette",
            "Palette",
            id="app.palette",
            tooltip="Search all commands",
            show=False,
            priority=True,
        ),
        Binding(
            "ctrl+z",
            "suspend_process",
            "Suspend",
            id="app.suspend",
            tooltip="Back to the shell; fg comes back, and an answer goes on",
            show=False,
            priority=True,
        ),
    ]

    def __init__(
        self,
        reference: str = "",
        *,
        settings: Settings | None = None,
        store_path: Path | None = None,
        system: str = "",
        goes_on: str = "",
        server: Server | None = None,
        loader: Callable[..., Model | RemoteModel] = load,
        finder: Callable[..., object] = check_model,
        job_program: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.reference = reference
        self.settings = settings or Settings()
        self.system = system
        self.goes_on = goes_on
        self.stuck = False
        self.store_path = store_path
        self.store_error: StoreError | None = None
        self.store = self._open_store()
        self.server = server
        if server is not None:
            loader, finder = _attaching(server), _finding(server)
        self.find_model = finder
        self.chat = ChatScreen()
        self.engine = EngineThread(self.chat.post_message, loader=loader, finder=finder)
        self.jobs = Jobs(self.post_message, job_program)
        self._asked_to_quit = False

    def _open_store(self) -> ConversationStore:
        try:
            return ConversationStore(self.store_path)
        except StoreError as error:
            self.store_error = error
            return ConversationStore(None)

    def check_store(self) -> None:
        """Raise StoreError if conversations are not saved for now; what could not be used is tried again."""
        if self.store.path != self.store_path:
            self._use_store(ConversationStore(self.store_path))
        self.store.check()

    def replace_store(self) -> Path | None:
        """Move a broken file aside and begin another; returns where it is now. Raises StoreError."""
        if self.store_path is None:
            return None
        self.store.close()
        aside = move_aside(self.store_path)
        self._use_store(ConversationStore(self.store_path))
        return aside

    def _use_store(self, store: ConversationStore) -> None:
        self.store, self.store_error = store, None
        self.chat.session.move_to(store)
        self.chat.say_unsaved(None)

    def notify(self, message: str, *, markup: bool = False, **options: Any) -> None:  # type: ignore[override]
        """Show a message as it is: brackets in names, errors and questions are no markup."""
        super().notify(storable(message), markup=False, **options)

    def on_mount(self) -> None:
        theme = str(self.settings.extra.get("theme", DEFAULT_THEME))
        self.theme = theme if theme in self.available_themes else DEFAULT_THEME
        self.theme_changed_signal.subscribe(self, self._remember_theme)
        self.engine.start()
        self._hear_signals()
        self.push_screen(self.chat)
        if self.settings.problem:
            self.notify(self.settings.problem, severity="warning", timeout=12)
        self.call_later(self._begin)

    async def _begin(self) -> None:
        if self.goes_on:
            await self._open_last()
        if self.system or not self.goes_on:
            self.chat.session.set_system(self.system)
        if self.reference:
            self.chat.load_model(self.reference)
        else:
            self.chat.action_pick_model()

    async def _open_last(self) -> None:
        try:
            last = self.store.search(limit=1) if self.goes_on == LAST else self.store.named(self.goes_on)
        except StoreError as error:
            self.notify(str(error), severity="error")
            return
        if last:
            await self.chat.open_conversation(last[0].id)
            return
        which = "no earlier conversation" if self.goes_on == LAST else f"no conversation {self.goes_on}"
        self.notify(f"there is {which}: this one begins")
        if self.goes_on != LAST:
            self.chat.session.rename(self.goes_on)

    def _remember_theme(self, theme: Any) -> None:
        self.settings.extra["theme"] = theme.name
        self._save_settings()

    def remember_model(self, reference: str) -> None:
        """Keep the name of the last model."""
        self.settings.extra["model"] = reference
        self._save_settings()

    def _save_settings(self) -> None:
        try:
            self.settings.save()
        except MobileError as error:
            self.notify(f"settings are not saved: {error}", severity="warning")

    @property
    def map_open(self) -> bool:
        """Whether the whole map is on the screen."""
        return any(isinstance(screen, MapScreen) for screen in self.screen_stack)

    def prompts(self) -> list[str]:
        """The history of the prompt."""
        try:
            return list(map(folded, self.store.prompts()))
        except StoreError:
            return []

    def model_names(self) -> list[str]:
        """References that a model can be loaded by."""
        if self.server is not None:
            return []  # the server would have to be asked while somebody types
        try:
            return names()
        except OSError:
            return []

    def candidates(self) -> list[Candidate]:
        """The models that can be picked; looks into files, or asks the server."""
        if self.server is None:
            return candidates()
        with contextlib.suppress(MobileError):
            return [Candidate(one["id"], None, None, f"at {self.server.url}") for one in listed(self.server)]
        return []

    # jobs

    def start_job(self, argv: list[str]) -> Job:
        """Run a verb of the command line in the background."""
        return self.jobs.start(argv)

    def jobs_note(self) -> str:
        """How many jobs run, for the title."""
        running = len(self.jobs.running)
        return f" · {running} job{'s' if running > 1 else ''}" if running else ""

    @on(JobHeard)
    def _job_heard(self, event: JobHeard) -> None:
        self.jobs.hear(event)

    @on(JobEnded)
    def _job_ended(self, event: JobEnded) -> None:
        job = self.jobs.ended(event)
        severity = "error" if job.state == FAILED else "information"
        self.notify(f"{job.state}: {job.phase}", title=job.title, severity=severity, timeout=10)
        if not self.chat.busy:
            self.chat._update_title()

    # keys and the palette

    def action_help(self) -> None:
        """Keys and commands."""
        self.chat.command_help("")

    def action_interrupt(self) -> None:
        """What Ctrl-C does: end the answer; else copy what is selected; else clear the prompt."""
        selected = self.screen.get_selected_text()
        prompt = self.chat.prompt
        if selected or (self.screen is self.chat and prompt.selected_text):
            self.copy_to_clipboard(selected or prompt.selected_text)
            self.notify("copied", timeout=2)
        elif self.chat.busy:
            self.engine.stop()
            self.chat.action_stop()
        elif prompt.text:
            prompt.put("")
        else:
            self.notify("Ctrl-Q leaves", timeout=3)

    def action_suspend_process(self) -> None:
        """What Ctrl-Z does: give the terminal back to the shell until it continues the program."""
        try:
            with self.suspend():
                stopped = stop_as_a_shell_does()
        except SuspendNotSupported:
            stopped = False
        if not stopped:
            self.notify("no shell waits for the chat: Ctrl-Q leaves", timeout=5)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: Textual's own commands and ours."""
        yield from super().get_system_commands(screen)
        for command in COMMANDS:
            if not command.argument or command.argument.startswith("["):
                yield SystemCommand(command.name, command.help, lambda name=command.name: self._obey(name))
        # Textual takes these names for markup: one with brackets is left to /model and the picker
        for name in (name for name in self.model_names() if "[" not in name):
            yield SystemCommand(f"/model {name}", "load it", lambda name=name: self._obey(f"/model {name}"))

    def _obey(self, line: str) -> None:
        self.run_worker(self.chat.obey(line))

    # the end

    def _hear_signals(self) -> None:
        """What ends the program from outside keeps the words so far; an ignored signal stays so."""
        for name, heard in (("SIGHUP", self._hung_up), ("SIGTERM", self._terminated)):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                    asyncio.get_running_loop().add_signal_handler(number, heard, number)

    def _terminated(self, number: signal.Signals) -> None:
        self.chat.keep_answer()
        self.engine.stop()
        self.exit(128 + number)

    def _hung_up(self, number: signal.Signals) -> None:
        # The terminal is gone, and a screen that waits for it to be written would never end.
        self.chat.keep_answer()
        self.jobs.close()
        self.store.close()
        self.engine.shut_down(_HUNG_UP_SECONDS)  # a model that is closed remembers what it used
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    async def action_quit(self) -> None:
        """Leave; with jobs running only when asked twice."""
        running = len(self.jobs.running)
        if running and not self._asked_to_quit:
            self._asked_to_quit = True
            self.notify(f"{running} running: Ctrl-Q again ends them and leaves", severity="warning")
            self.set_timer(5, self._forget_quit)
            return
        self.engine.stop()
        self.exit(0)

    def _forget_quit(self) -> None:
        self._asked_to_quit = False

    def close(self) -> bool:
        """After the screen is gone: end jobs and engine; False if the engine did not come back."""
        self.jobs.close()
        self.stuck = not self.engine.shut_down(_PATIENCE_SECONDS)
        self.store.close()
        return not self.stuck
