"""All options on a screen, made from their declarations; a change counts from the next answer on."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Footer, Input, Select, Static

from mobile_gguf.errors import MobileError
from mobile_gguf.options import Opt

from ..store.settings import Settings, answer_settings, load_settings
from .dialog import Dialog


class SettingsScreen(Dialog[bool]):
    """Edits a Settings; the result is True if the model is to be loaded again."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+l", "reload", "Reload the model", id="settings.reload", tooltip="Load it with these"),
        Binding("ctrl+d", "default", "Default", id="settings.default", tooltip="As declared", priority=True),
    ]

    def __init__(self, settings: Settings, *, has_model: bool) -> None:
        super().__init__()
        self._settings = settings
        self._has_model = has_model

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Settings"
            with VerticalScroll(can_focus=False):
                yield Static("From the next answer on", classes="heading")
                for name, opt in answer_settings().items():
                    yield from self._row(name, opt)
                yield Static("When the model is loaded again (Ctrl-L)", classes="heading")
                for name, opt in load_settings().items():
                    yield from self._row(name, opt)
            yield Static("", id="problem")
        yield Footer(show_command_palette=False)

    def _row(self, name: str, opt: Opt) -> ComposeResult:
        value = self._settings.value(name)
        with Horizontal(classes="setting"):
            yield Static(name, classes="name")
            words = opt.choices or opt.switch
            if words:
                shown = value if opt.choices else self._settings.text(name)
                yield Select(
                    [(word, word) for word in words], value=shown, id=name, allow_blank=False, compact=True
                )
            else:
                placeholder = "default" if value is None else ""
                yield Input(self._settings.text(name), id=name, placeholder=placeholder, compact=True)
            yield Static(Content(_help(opt)), classes="help")

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        self._set(event.input.id, event.value.strip() or "default")

    @on(Select.Changed)
    def _selected(self, event: Select.Changed) -> None:
        self._set(event.select.id, str(event.value))

    def _set(self, name: str | None, text: str) -> None:
        if name is None or text == (self._settings.text(name) or "default"):
            return
        problem = ""
        try:
            self._settings.set(name, text)
        except MobileError as error:
            problem = str(error)
        else:
            if name in load_settings() and self._has_model:
                problem = f"{name} counts when the model is loaded again: Ctrl-L"
        self.query_one("#problem", Static).update(Content(problem))

    def action_default(self) -> None:
        """Give the focused option its default."""
        focused = self.focused
        if not isinstance(focused, (Input, Select)) or focused.id is None:
            return
        name = focused.id
        self._set(name, "default")
        focused.value = self._settings.text(name)

    def action_reload(self) -> None:
        """Load the model again with these options."""
        self.dismiss(True)


def _help(opt: Opt) -> str:
    """The help of the option's flag, which may be one that turns it off."""
    return f"off: {opt.help}" if opt.is_flag and opt.flags[-1].startswith("--no-") else opt.help
