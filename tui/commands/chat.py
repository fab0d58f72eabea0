"""What the slash commands and the keys for them do; the other half of the chat screen."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path

from textual.containers import VerticalScroll

from mobile_gguf.api.stats import stats_lines
from mobile_gguf.config import VERBS, preset_names, read_preset
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.atomic import disk_errors, partial_path
from mobile_gguf.wording import why

from ..clipboard import copy
from ..screens.chat_view import ChatView
from ..screens.confirm import Confirm
from ..screens.conversations import Conversations
from ..screens.help import Help
from ..screens.jobs import JobsScreen
from ..screens.models import ModelPicker
from ..screens.settings import SettingsScreen
from ..screens.text import TextScreen
from ..store.conversations import StoreError
from ..store.settings import load_settings
from ..widgets.prompt import Prompt
from ..widgets.turn_view import AnswerView
from .slash import find


class ChatCommands(ChatView):
    """Commands: each is a method ``command_NAME`` that takes the rest of the line."""

    async def obey(self, line: str) -> None:
        """Obey a line that begins with a slash; errors become messages."""
        name, _, rest = line.partition(" ")
        command = find(name)
        if command is None:
            self.notify(f"unknown command {name}; / lists the commands", severity="warning")
            return
        try:
            result = getattr(self, f"command_{command.action}")(rest.strip())
            if result is not None:
                await result
        except MobileError as error:
            self.notify(str(error), severity="error", timeout=10)
        except OSError as error:
            self.notify(f"{why(error)}: {error.filename}", severity="error", timeout=10)

    # screens

    def command_help(self, _rest: str) -> None:
        self.app.push_screen(Help([*Prompt.BINDINGS, *self.BINDINGS, *self.app.BINDINGS]))

    def action_help(self) -> None:
        self.command_help("")

    def action_pick_model(self) -> None:
        """Pick a model from a list."""

        def chosen(reference: str | None) -> None:
            if reference:
                self.load_model(reference)

        self.app.push_screen(ModelPicker(self.reference if self.facts else ""), chosen)

    def command_model(self, rest: str) -> None:
        if rest:
            self.load_model(rest)
        else:
            self.action_pick_model()

    def command_reload(self, _rest: str) -> None:
        if not self.reference:
            raise UsageError("no model is loaded: /model picks one")
        self.load_model(self.reference)

    def action_find(self) -> None:
        """Find and open saved conversations."""
        self.command_search("")

    def command_search(self, rest: str) -> None:
        async def chosen(conversation: int | None) -> None:
            if self.session.id is not None and not self._is_saved(self.session.id):
                await self.command_new("")  # it was deleted over there
            if conversation is not None:
                await self.open_conversation(conversation)

        self.app.push_screen(Conversations(self.app.store, rest), chosen)

    def _is_saved(self, conversation: int) -> bool:
        try:
            self.app.store.open(conversation)
        except StoreError:
            return False
        return True

    async def open_conversation(self, conversation: int) -> None:
        """Continue a saved conversation."""
        if self.busy:
            self.notify("the model is at work; Esc ends that", severity="warning")
            return
        try:
            self.session.open(conversation)
        except StoreError as error:
            self.notify(str(error), severity="error")
        await self.show_session()

    def action_settings(self) -> None:
        """All options on a screen."""

        def closed(reload: bool | None) -> None:
            self._update_title()
            if reload and self.reference:
                self.load_model(self.reference)

        self.app.push_screen(SettingsScreen(self.app.settings, has_model=bool(self.facts)), closed)

    def command_settings(self, _rest: str) -> None:
        self.action_settings()

    def action_jobs(self) -> None:
        """Background jobs."""
        self.app.push_screen(JobsScreen(self.app.jobs))

    def command_jobs(self, _rest: str) -> None:
        self.action_jobs()

    # the conversation

    async def action_new(self) -> None:
        """Begin another conversation."""
        await self.command_new("")

    async def command_new(self, _rest: str) -> None:
        if self.busy:
            self.notify("the model is at work; Esc ends that", severity="warning")
            return
        self._end_editing()
        self.session.new()
        await self.show_session()
        self.prompt.focus()

    def command_rename(self, rest: str) -> None:
        if not rest:
            raise UsageError("/rename needs a title")
        self.session.rename(rest)
        self.notify(f"renamed to {self.session.title}")

    def command_delete(self, _rest: str) -> None:
        if self.session.id is None:
            raise UsageError("this conversation is not saved: /new begins another")

        async def answered(sure: bool | None) -> None:
            conversation = self.session.id
            if sure and conversation is not None:
                with contextlib.suppress(StoreError):
                    self.app.store.delete(conversation)
                await self.command_new("")

        self.app.push_screen(Confirm(f"Delete “{self.session.title}”?"), answered)

    def command_export(self, rest: str) -> None:
        if not self.session.turns:
            raise UsageError("there is nothing to export yet")
        path = _export_path(rest, self.session.title)
        if path.exists() and not rest:
            raise UsageError(f"{path} exists: /export FILE writes elsewhere")
        _write_export(path, self.session.markdown())
        self.notify(f"written to {path}")

    def command_save(self, _rest: str) -> None:
        try:
            self.app.check_store()
        except StoreError as error:
            if not error.broken:
                raise
            question = f"{error}. Move the file aside and begin a new one? It is kept, beside the new one."
            self.app.push_screen(Confirm(question), self._move_store_aside)
        else:
            self.session.save_all()
            where = self.app.store_path or "memory only"
            self.notify(f"conversations are saved in {where}")

    def _move_store_aside(self, sure: bool | None) -> None:
        if not sure:
            return
        try:
            aside = self.app.replace_store()
        except StoreError as error:
            self.notify(str(error), severity="error", timeout=10)
        else:
            self.notify(f"saved anew; what was there is {aside}", timeout=12)

    def command_system(self, rest: str) -> None:
        if rest:
            self.session.set_system("" if rest.lower() == "none" else rest)
        self.notify(f"system message: {self.session.system or 'none'}", timeout=8)

    def action_edit_last(self) -> None:
        """Edit the last question."""
        position = self.session.last_question()
        if position is not None:
            self.edit(position)

    def command_edit(self, _rest: str) -> None:
        self.action_edit_last()

    async def action_regenerate(self) -> None:
        """Answer the last question again."""
        position = self.session.last_question()
        if position is not None:
            await self.regenerate(position + 1)

    async def command_regenerate(self, _rest: str) -> None:
        await self.action_regenerate()

    def command_stop(self, _rest: str) -> None:
        self.action_stop()

    def command_copy(self, rest: str) -> None:
        answers = list(self.query(AnswerView))
        if not answers:
            raise UsageError("there is no answer to copy yet")
        if rest != "code":
            copy(self.app, answers[-1].text, "answer")
            return
        blocks = answers[-1].markdown.code_blocks()
        if not blocks:
            raise UsageError("the last answer has no code block")
        copy(self.app, blocks[-1], "code block")

    # options and facts

    def command_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            self.action_settings()
            return
        settings = self.app.settings
        if not value.strip():
            plain = name.lstrip("-").replace("-", "_")
            self.notify(f"{plain} = {settings.value(plain)}")
            return
        found = settings.set(name, value.strip())
        later = " after /reload" if found in load_settings() and (self.facts or self.busy) else ""
        self.notify(f"{found} = {settings.text(found) or 'default'}{later}")
        self._update_title()

    def command_preset(self, rest: str) -> None:
        preset = read_preset(rest, "chat", VERBS) if rest else None
        if preset is None:
            raise UsageError(f"/preset needs a name: there are {', '.join(preset_names()) or 'none'}")
        changes_load = self.app.settings.take({name: one.value for name, one in preset.options.items()})
        if preset.system is not None:
            self.session.set_system(preset.system)
        if preset.model is not None and preset.model != (self.reference if self.facts else ""):
            self.load_model(preset.model)
        later = " · its budgets and the like after /reload" if changes_load and preset.model is None else ""
        self.notify(f"preset {preset.name}{later}")
        self._update_title()

    def command_stats(self, _rest: str) -> None:
        if not self.facts:
            raise UsageError("no model is loaded: /model picks one")
        self.app.push_screen(TextScreen("What the model did so far", "\n".join(stats_lines(self.facts))))

    def command_map(self, _rest: str) -> None:
        self.action_toggle_map()

    def command_tokens(self, _rest: str) -> None:
        self.action_toggle_tokens()

    def command_theme(self, rest: str) -> None:
        if not rest:
            self.app.search_themes()
        elif rest in self.app.available_themes:
            self.app.theme = rest
        else:
            raise UsageError(f"no theme {rest!r}: there are {', '.join(sorted(self.app.available_themes))}")

    # jobs and the end

    def command_pull(self, rest: str) -> None:
        self._start_job("pull", rest)

    def command_convert(self, rest: str) -> None:
        self._start_job("convert", rest)

    def command_calibrate(self, rest: str) -> None:
        self._start_job("calibrate", rest)

    def _start_job(self, verb: str, rest: str) -> None:
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise UsageError(f"cannot read the command: {error}") from None
        if not words:
            raise UsageError(f"/{verb} needs a model")
        job = self.app.start_job([verb, *words])
        self.notify(f"{job.title} runs in the background; F8 shows it")
        self._update_title()

    async def command_quit(self, _rest: str) -> None:
        await self.app.action_quit()

    def action_page(self, direction: int) -> None:
        """Scroll the transcript by a page."""
        transcript = self.query_one("#transcript", VerticalScroll)
        if direction < 0:
            transcript.scroll_page_up(animate=False)
        else:
            transcript.scroll_page_down(animate=False)


def _write_export(path: Path, text: str) -> None:
    """Write a file whole, or leave the one that is there; what is no file, such as a pipe, is written to."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    partial = partial_path(target)
    with disk_errors(path, remedy=""):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _export_path(given: str, title: str) -> Path:
    """Where an export goes: as given, else a file named by the title in the working directory."""
    if given:
        return Path(given).expanduser()
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in title.lower())
    return Path.cwd() / f"{name.strip('-') or 'conversation'}.md"
