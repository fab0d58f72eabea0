"""The jobs: what runs in the background, how far it is, and what it said."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from ..commands.jobs import RUNNING, Job, Jobs
from .dialog import Dialog

_STYLES = {"running": "$warning", "done": "$success", "failed": "$error", "cancelled": "$text-muted"}


class JobsScreen(Dialog[None]):
    """Lists the jobs and shows the output of the highlighted one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x,delete", "cancel", "Cancel job", id="jobs.cancel", tooltip="End the highlighted job"),
    ]

    def __init__(self, jobs: Jobs) -> None:
        super().__init__()
        self._jobs = jobs

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Jobs"
            box.border_subtitle = "/pull, /convert and /calibrate start one"
            yield OptionList(id="jobs")
            with VerticalScroll(id="job-output"):
                yield Static(id="job-lines")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(OptionList).focus()
        self._draw()
        self.set_interval(0.3, self._draw)

    def _draw(self) -> None:
        options, jobs = self.query_one(OptionList), list(self._jobs.jobs.values())
        if options.option_count != len(jobs):
            options.clear_options()
            options.add_options([Option(_row(job), id=str(job.id)) for job in jobs])
            options.highlighted = len(jobs) - 1 if jobs else None
        else:
            for at, job in enumerate(jobs):
                options.replace_option_prompt_at_index(at, _row(job))
        at = options.highlighted
        text = "\n".join(jobs[at].lines) if at is not None and at < len(jobs) else "no jobs yet"
        self.query_one("#job-lines", Static).update(Content(text))

    def action_cancel(self) -> None:
        """End the highlighted job."""
        at = self.query_one(OptionList).highlighted
        jobs = list(self._jobs.jobs.values())
        if at is not None and at < len(jobs) and jobs[at].state == RUNNING:
            self._jobs.cancel(jobs[at].id)


def _row(job: Job) -> Content:
    share = f" {job.share:.0%}" if job.share is not None and job.state == RUNNING else ""
    return Content.assemble(
        (job.title, "bold"), "\n  ", (f"{job.state}{share}", _STYLES[job.state]), f"  {job.phase}"
    )
