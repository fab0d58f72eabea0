"""The model picker: names, sizes, and how each model fits into this machine's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Footer, Input, OptionList
from textual.widgets.option_list import Option

from mobile_gguf.plan.known import Here
from mobile_gguf.sizes import format_bytes

from ..store.models import Candidate, Fit, fit_of
from .dialog import Dialog

if TYPE_CHECKING:
    from ..app import ChatApp


class ModelPicker(Dialog[str]):
    """The result is a model reference. Files are looked into by a worker, while the list is there already."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "focus_list", "List", id="models.list", tooltip="Go to the list", show=False),
    ]
    app: ChatApp

    @dataclass
    class Listed(Message):
        """The models at hand."""

        candidates: list[Candidate]

    @dataclass
    class Measured(Message):
        """How one of them fits."""

        reference: str
        fit: Fit

    def __init__(self, current: str = "") -> None:
        super().__init__()
        self._current = current
        self.candidates: list[Candidate] = []
        self.fits: dict[str, Fit] = {}

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Models"
            box.border_subtitle = "/pull MODEL in the chat fetches one"
            yield Input(placeholder="filter, or a path to a GGUF, or hf:org/repo", id="reference")
            yield OptionList(id="models")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self._look()

    @work(thread=True, exclusive=True)
    def _look(self) -> None:
        found = self.app.candidates()
        self.post_message(self.Listed(found))
        options = self.app.settings.load_options()
        here = Here(options.get("rpc", ""))
        for candidate in found:
            fit = fit_of(candidate, options, here)
            self.post_message(self.Measured(candidate.reference, fit))

    @on(Listed)
    def _listed(self, event: Listed) -> None:
        self.candidates = event.candidates
        self._draw()

    @on(Measured)
    def _measured(self, event: Measured) -> None:
        self.fits[event.reference] = event.fit
        self._draw()

    @on(Input.Changed)
    def _filter(self) -> None:
        self._draw()

    def _draw(self) -> None:
        options, reference = self.query_one(OptionList), self.query_one(Input).value.strip()
        typed = reference.lower()
        at = options.highlighted or 0
        options.clear_options()
        for candidate in self.candidates:
            if typed in candidate.reference.lower():
                options.add_option(Option(self._row(candidate), id=candidate.reference))
        if options.option_count:
            options.highlighted = min(at, options.option_count - 1)
        elif typed:
            options.add_option(Option(Content(f"Enter loads {reference}"), disabled=True))

    def _row(self, candidate: Candidate) -> Content:
        size = format_bytes(candidate.n_bytes) if candidate.n_bytes is not None else "-"
        fit = self.fits.get(candidate.reference)
        mark = " (loaded)" if candidate.reference == self._current else ""
        first = Content.assemble((candidate.reference, "bold"), mark, "  ", size)
        if fit is None:
            return Content.assemble(first, "\n  ", ("looking …", "$text-muted"))
        parts = [part for part in (fit.experts and f"{fit.experts}", fit.fit, fit.speed) if part]
        return Content.assemble(first, "\n  ", ("; ".join(parts), "$text-muted"))

    def action_focus_list(self) -> None:
        """Go to the list."""
        self.query_one(OptionList).focus()

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        typed, options = event.value.strip(), self.query_one(OptionList)
        at = options.highlighted
        if options.option_count and at is not None and not options.get_option_at_index(at).disabled:
            self.dismiss(options.get_option_at_index(at).id)
        elif typed:
            self.dismiss(typed)
