"""The chat: transcript, prompt and expert map; owns the conversation and what the engine is doing."""

from __future__ import annotations

import time
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Footer, Static
from textual.worker import get_current_worker

from mobile_gguf.api.attached_files import folded, with_files
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.generate.answer.answer import INTERRUPTED, LENGTH

from ..commands.chat import ChatCommands
from ..commands.slash import complete, find
from ..commands.values import completion_values
from ..engine.expert_state import ExpertState
from ..engine.messages import (
    AnswerEnded,
    AnswerProgressed,
    LoadFailed,
    LoadProgressed,
    ModelFound,
    ModelLoaded,
    PromptProgressed,
)
from ..engine.thread import unexpected
from ..store.conversations import StoreError, storable
from ..store.session import Session
from ..widgets.completion_list import CompletionList
from ..widgets.prompt import Prompt
from ..widgets.side_panel import SidePanel
from ..widgets.title_bar import TitleBar
from ..widgets.turn_view import AnswerView, QuestionView
from .chat_state import ANSWERING, IDLE, LOADING
from .dialog import NARROW_OR_WIDE

_WELCOME = (
    """Type a question and press Enter. Ctrl-O picks a model, F1 shows all keys, / lists the commands."""
)
# How often the map is drawn while something moves.
_MAP_SECONDS = 0.15
_DRAFT_SECONDS = 2.0


class ChatScreen(ChatCommands):
    """The main screen. Engine and jobs post messages here; handlers own all state."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+o,f2", "pick_model", "Models", id="chat.models", tooltip="Pick a model"),
        Binding("ctrl+r,f3", "find", "Find", id="chat.find", tooltip="Find and open saved conversations"),
        Binding("ctrl+s,f4", "settings", "Settings", id="chat.settings", tooltip="Mode, sampling, budgets"),
        Binding("ctrl+n", "new", "New", id="chat.new", tooltip="Begin another conversation"),
        Binding("ctrl+g,f6", "toggle_map", "Map", id="chat.map", tooltip="Show or hide the expert map"),
        Binding(
            "ctrl+t,f7", "toggle_tokens", "Tokens", id="chat.tokens", tooltip="Colour tokens by their pass"
        ),
        Binding("f5", "regenerate", "Again", id="chat.regenerate", tooltip="Answer again", show=False),
        Binding("f8", "jobs", "Jobs", id="chat.jobs", tooltip="Background jobs", show=False),
        Binding("f9", "full_map", "Full map", id="chat.full_map", tooltip="The whole expert map", show=False),
        Binding("ctrl+up", "edit_last", "Edit", id="chat.edit", tooltip="Edit the last question", show=False),
        Binding("escape", "stop", "Stop", id="chat.stop", tooltip="End the answer", show=False),
        Binding(
            "pageup", "page(-1)", "Up", id="chat.page_up", tooltip="Scroll back", show=False, priority=True
        ),
        Binding(
            "pagedown", "page(1)", "Down", id="chat.page_down", tooltip="Scroll on", show=False, priority=True
        ),
    ]
    HORIZONTAL_BREAKPOINTS = NARROW_OR_WIDE

    def __init__(self) -> None:
        super().__init__()
        self._completion_values = completion_values(self)

    def compose(self) -> ComposeResult:
        yield TitleBar(id="title")
        with Horizontal(id="body"):
            with Vertical(id="chat"):
                with VerticalScroll(id="transcript", can_focus=False):
                    yield Static(_WELCOME, id="welcome")
                yield Static("", id="unsaved")
                yield CompletionList(id="completions")
                yield Prompt(id="prompt")
            yield SidePanel(id="experts")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.session = Session(self.app.store, self.say_unsaved)
        self.say_unsaved(self.app.store_error)
        self.prompt.prompts = self.app.prompts()
        self.query_one(CompletionList).display = False
        self.query_one("#transcript", VerticalScroll).anchor()
        self.prompt.completer = lambda text: complete(text, self._completion_values)
        self.prompt.border_subtitle = "Enter sends, Ctrl-J new line"
        self.prompt.focus()
        self._update_map_shown()
        self.set_interval(_MAP_SECONDS, self._tick)

    def say_unsaved(self, error: StoreError | None) -> None:
        """Say that conversations are not saved for as long as they are not, and what helps."""
        line = self.query_one("#unsaved", Static)
        line.display = error is not None
        if error is not None:
            line.update(
                Content(storable(f"Not saved: {error} · /save tries again, /export FILE writes this one"))
            )

    # loading

    def load_model(self, reference: str) -> None:
        """Load a model, in place of the one that is there, once it is seen to be one."""
        if self.state == IDLE:
            self.state, self._wanted, self._finding = LOADING, reference, True
            self.query_one(TitleBar).activity = f"looking for {reference} · Esc cancels"
            self._update_title()
        self._find_model(reference)

    @work(thread=True, exclusive=True, group="find")
    def _find_model(self, reference: str) -> None:
        error = ""
        try:
            self.app.find_model(reference)
        except MobileError as failure:
            error = str(failure)
        except Exception as failure:  # as in the engine's thread
            error = unexpected(failure)
        if not get_current_worker().is_cancelled:
            self.post_message(ModelFound(reference, error))

    @on(ModelFound)
    def _model_found(self, event: ModelFound) -> None:
        alone, self._finding = self._finding, False
        if event.error:
            failed = LoadFailed(
                event.reference, event.error, keeps_model=bool(self.facts), number=self._load_number
            )
            if alone:
                self._load_failed(failed)
            else:
                self._say_failure(failed)
            return
        # what is not answered to its end has its words kept
        self.state, self._wanted, self._started = LOADING, event.reference, time.monotonic()
        self.query_one(TitleBar).activity = f"loading {event.reference} · Esc cancels"
        self._update_title()
        self._load_number += 1
        self.app.engine.load(event.reference, self.app.settings.load_options(), self._load_number)

    @on(LoadProgressed)
    def _load_progressed(self, event: LoadProgressed) -> None:
        if self.state == LOADING:
            self.query_one(TitleBar).activity = f"{event.phase} {event.share:.0%} · Esc cancels"

    @on(ModelLoaded)
    def _model_loaded(self, event: ModelLoaded) -> None:
        if event.number != self._load_number:
            return  # another one is on its way in its place
        self.reference, self.facts = event.reference, event.facts
        self.app.settings.of_model = event.sampling
        self.model_name = event.name
        self.state, self._wanted = IDLE, ""
        self.context_used = 0
        experts = event.experts
        state = (
            ExpertState(experts.layers, experts.n_expert, event.expert_bytes) if experts.has_store else None
        )
        self.query_one(SidePanel).set_state(state)
        self._read_places()
        self._update_title()
        for notice in event.notices:
            self.notify(notice, severity="warning", timeout=8)
        if self.app.server is None:
            self.app.remember_model(event.reference)
        if self._pending:
            pending, self._pending = self._pending, ""
            self.call_later(self.ask, pending)

    @on(LoadFailed)
    def _load_failed(self, event: LoadFailed) -> None:
        if event.number != self._load_number:
            return
        if self._pending:
            self.prompt.put(folded(self._pending))
            self._pending = ""
        if self.state == LOADING:
            self.state, self._wanted = IDLE, ""
        if not event.keeps_model:
            self._before = self.reference if self.facts else ""
            self.facts, self.model_name, self.reference = {}, "", event.reference
            self.query_one(SidePanel).set_state(None)
        self._update_title()
        self._say_failure(event)

    def _say_failure(self, event: LoadFailed) -> None:
        severity = "warning" if event.cancelled else "error"
        hint = " · Ctrl-S changes it, /reload tries again" if event.about_option else ""
        if event.keeps_model and not event.cancelled:
            hint += f" · {self.model_name} stays"
        elif self._before and not event.keeps_model:
            hint += f" · /model {self._before} loads the last one again"
        self.notify(event.error + hint, title=event.reference, severity=severity, timeout=12)

    # asking

    @on(Prompt.Submitted)
    async def _submitted(self, event: Prompt.Submitted) -> None:
        self._hide_completions()
        event.text = storable(event.text)
        if event.text.startswith("/"):
            self.prompt.remember(event.text)
            await self.obey(event.text)
        elif self.state == ANSWERING:
            self.prompt.give_back(event.text)
            self.notify("the model is still answering; Esc ends that", severity="warning")
        else:
            self.prompt.remember(event.text)
            try:
                text = storable(with_files(event.text))
            except UsageError as error:
                self.prompt.give_back(event.text)
                self.notify(str(error), severity="error", timeout=10)
                return
            await self.ask(text)

    async def ask(self, text: str) -> None:
        """Ask the model; while it is loading the question waits."""
        if self.state == LOADING:
            self._pending = text
            self.notify("asked as soon as the model is loaded")
            return
        if not self.facts:
            self.prompt.give_back(folded(text))
            self.notify("pick a model first", severity="warning")
            self.action_pick_model()
            return
        if self._editing is not None:
            await self.cut(self._editing)
            self._end_editing()
        self.session.ask(text, self.reference)
        await self._add_view(QuestionView(folded(text), len(self.session.turns) - 1))
        await self._generate()

    async def _generate(self) -> None:
        self.state = ANSWERING
        self._started = self._drafted = time.monotonic()
        self._answer_id += 1
        self._prompt_done = ""
        self._answer = AnswerView(len(self.session.turns), coloured=self.coloured)
        await self._add_view(self._answer)
        self.query_one("#transcript", VerticalScroll).anchor()
        self._say_prompt()
        self.app.engine.watching = self._map_shown
        self.app.engine.generate(self._answer_id, self.session.messages, self.app.settings.answer_options())

    @on(PromptProgressed)
    def _prompt_progressed(self, event: PromptProgressed) -> None:
        if event.answer_id == self._answer_id:
            self._prompt_done = f"{event.done} of {event.total} tokens"
            self._say_prompt()

    @on(AnswerProgressed)
    def _answer_progressed(self, event: AnswerProgressed) -> None:
        tokens, asked = event.outbox.take()
        if event.outbox.answer_id != self._answer_id or self._answer is None:
            return
        self.query_one(SidePanel).add_tokens(tokens, asked)
        rate = event.outbox.tokens_per_second
        self.query_one(SidePanel).set_rate(rate)
        if rate > 0 and self._answer.tokens and self.state == ANSWERING:
            self.query_one(TitleBar).activity = f"{rate:.1f} tok/s · Esc stops"
        self._answer.add(tokens)
        self._save_draft()

    @on(AnswerEnded)
    async def _answer_ended(self, event: AnswerEnded) -> None:
        view = self._answer
        if event.answer_id != self._answer_id or view is None:
            return
        self._answer = None
        if self.state == ANSWERING:  # else the next model is loading already
            self.state = IDLE
        if event.facts:
            self.facts = event.facts
            if event.receipt is not None:
                self.facts |= {"mode": event.receipt.mode, "little_k": event.receipt.little_k}
                self.facts["spent"] = event.receipt.spent
        await view.end_stream()
        receipt = _receipt_line(event)
        if event.error and not view.text:
            # What was not answered can be asked again: it goes back into the prompt.
            await self._take_back(view)
        else:
            view.finish(" | ".join(filter(None, (receipt, event.error))), failed=bool(event.error))
            self.session.answer(view.text, receipt, view.tokens, self.reference)
        if event.error:
            self.notify(event.error, title="the answer failed", severity="error", timeout=15)
        self.context_used = event.prompt_tokens + event.completion_tokens
        panel = self.query_one(SidePanel)
        if event.tokens_per_second:
            panel.set_rate(event.tokens_per_second)
        if panel.state is not None:
            panel.state.settle()
        self._read_places()
        self._update_title()

    def _save_draft(self) -> None:
        """Save the words so far now and then: whatever ends the program, they were paid for."""
        if time.monotonic() - self._drafted > _DRAFT_SECONDS:
            self.keep_answer()

    def keep_answer(self) -> None:
        """Save the words so far of the answer that is made, if one is."""
        if self._answer is not None and self._answer.text:
            self._drafted = time.monotonic()
            self.session.draft(self._answer.text, self._answer.tokens, self.reference)

    async def _take_back(self, view: AnswerView) -> None:
        question = self.session.turns[-1].content
        await view.remove()
        await self.cut(len(self.session.turns) - 1)
        if not self.prompt.text:
            self.prompt.put(folded(question))

    async def cut(self, position: int) -> None:
        """Forget the turns from ``position`` on, on the screen as well."""
        self.session.cut(position)
        for view in [*self.query(QuestionView), *self.query(AnswerView)]:
            if view.position >= position:
                await view.remove()

    async def _add_view(self, view: QuestionView | AnswerView) -> None:
        self.query_one("#welcome").display = False
        await self.query_one("#transcript", VerticalScroll).mount(view)

    async def show_session(self) -> None:
        """Draw the conversation that the session holds."""
        transcript = self.query_one("#transcript", VerticalScroll)
        await transcript.remove_children(".question, .answer")
        for position, turn in enumerate(self.session.turns):
            if turn.role == "user":
                await self._add_view(QuestionView(folded(turn.content), position))
            else:
                view = AnswerView(position, coloured=self.coloured)
                await self._add_view(view)
                await view.restore(turn.content, turn.tokens, turn.receipt)
        self.query_one("#welcome").display = not self.session.turns
        self.context_used = 0
        self._update_title()
        transcript.anchor()

    # editing and answering again

    @on(QuestionView.Edit)
    def _edit_asked(self, event: QuestionView.Edit) -> None:
        self.edit(event.position)

    @on(AnswerView.Regenerate)
    async def _regenerate_asked(self, event: AnswerView.Regenerate) -> None:
        await self.regenerate(event.position)

    def edit(self, position: int) -> None:
        """Put a question back into the prompt; sending it replaces it and all that followed."""
        if self.busy:
            self.notify("the model is at work; Esc ends that", severity="warning")
            return
        self._editing = position
        self.prompt.put(folded(self.session.turns[position].content))
        self.prompt.border_title = "editing: sending replaces what followed · Esc keeps it"
        self.prompt.focus()

    def _end_editing(self) -> None:
        self._editing = None
        self.prompt.border_title = None

    async def regenerate(self, position: int) -> None:
        """Answer again from the question before ``position``."""
        if self.busy or not self.facts:
            self.notify("load a model first" if not self.busy else "the model is at work", severity="warning")
            return
        await self.cut(position)
        if self.session.turns:
            await self._generate()

    # stopping

    def action_stop(self) -> None:
        """End what is going on: completion, editing, the answer or loading."""
        if self.query_one(CompletionList).display:
            self._hide_completions()
        elif self._editing is not None:
            self._end_editing()
            self.prompt.put("")
        elif self._finding and self.state == LOADING:
            self.workers.cancel_group(self, "find")
            self._finding = False
            error, kept = "loading was cancelled", bool(self.facts)
            self._load_failed(LoadFailed(self._wanted, error, True, kept, number=self._load_number))
        elif self.busy:
            self.app.engine.stop()
            self.query_one(TitleBar).activity = "cancelling" if self.state == LOADING else "stopping"
        else:
            self.prompt.focus()

    # completion

    @on(Prompt.Changed)
    def _prompt_changed(self) -> None:
        found = complete(self.prompt.text, self._completion_values)
        self.prompt.completing = self.query_one(CompletionList).show(found)

    @on(Prompt.CompletionKey)
    def _completion_key(self, event: Prompt.CompletionKey) -> None:
        completions, typed = self.query_one(CompletionList), self.prompt.text
        # What is typed or pasted fast is ahead of the list.
        found = complete(typed, self._completion_values)
        if found != completions.completions:
            completions.show(found)
        chosen = completions.chosen
        if event.key in ("up", "down"):
            completions.move(1 if event.key == "down" else -1)
        elif event.key == "escape" or chosen is None:
            self._hide_completions()
        else:
            command = find(chosen.line.split(" ")[0])
            is_whole = typed == chosen.line.rstrip() or (command is not None and not command.argument)
            self.prompt.put(chosen.line)
            if event.key == "enter" and is_whole:
                self._hide_completions()
                self.prompt.action_submit()

    @on(CompletionList.OptionSelected)
    def _completion_clicked(self, event: CompletionList.OptionSelected) -> None:
        event.stop()
        self._completion_key(Prompt.CompletionKey("tab"))
        self.prompt.focus()

    def _hide_completions(self) -> None:
        self.query_one(CompletionList).show([])
        self.prompt.completing = False


def _receipt_line(event: AnswerEnded) -> str:
    receipt, reason = event.receipt, event.finish_reason
    if receipt is None:
        return "stopped before the first token" if reason == INTERRUPTED else ""
    ends = {INTERRUPTED: " | stopped", LENGTH: " | cut at max_tokens"}
    end = ends.get(reason, "")
    if receipt.context_full:
        n_ctx = event.prompt_tokens + event.completion_tokens
        end = f" | cut: the context of {n_ctx} is full; /set n_ctx {2 * n_ctx} and /reload, or /new"
    return receipt.summary(event.tokens_per_second) + end
