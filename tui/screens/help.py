"""The help screen: keys and commands, made from the bindings and the table of commands."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Footer, Static

from ..commands.slash import COMMANDS
from .dialog import Dialog

_FIRST, _SECOND = 22, 51  # columns; together what a terminal of 80 has room for
_KEYS = {"up": "Up", "pageup": "Page-Up", "pagedown": "Page-Down", "underscore": "_"}
_MORE = {
    "On a question or an answer (Tab and Shift-Tab go there)": [
        ("e", "edit the question and send it again"),
        ("c", "copy it"),
        ("b", "copy its next code block"),
        ("r", "answer again"),
    ],
    "The receipt: 9 big · 30 little | 84% hits | 12 MiB read | 40 ms stalled": [
        ("big, little", "tokens that ran with all their experts, and with fewer"),
        ("fallback", "tokens that ran little first, and then big as well"),
        ("hits", "how many of the needed experts were in memory"),
        ("read", "what the others took from the disk"),
        ("stalled", "how long the computation waited for them"),
        ("KL 0.012 of 0.02", "mode auto: divergence from exact, as estimated, of what it may be"),
        ("audited", "tokens that mode auto ran exactly as well, to know it"),
    ],
    "The expert map: a row for each layer, a column for each expert": [
        ("█ X", "hit, or missed, by the last token"),
        ("▒ x", "hit, or missed, by one of the three before"),
        ("░ ·", "in RAM, or on the disk only"),
        ("▓ ◆", "on a device (a GPU or an RPC server), and hit there"),
        ("+", "is being read"),
        ("", "Where several share a cell, a hit or a miss among them is shown."),
    ],
}


class Help(Dialog[None]):
    """Lists every key and every command."""

    def __init__(self, bindings: Iterable[BindingType]) -> None:
        super().__init__()
        self._shown = bindings

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Help"
            box.border_subtitle = "Esc closes, Up and Down scroll"
            with VerticalScroll():
                for heading, rows in help_sections(self._shown).items():
                    yield Static(Content(heading), classes="heading")
                    yield Static(_table(rows))
        yield Footer(show_command_palette=False)


def help_sections(bindings: Iterable[BindingType]) -> dict[str, list[tuple[str, str]]]:
    """Keys and commands, each with what it does, by heading."""
    keys = [
        (shown_keys(item.key), item.tooltip[:1].lower() + item.tooltip[1:])
        for item in bindings
        if isinstance(item, Binding) and item.tooltip
    ]
    commands = [(f"{item.name} {item.argument}".rstrip(), item.help) for item in COMMANDS]
    return {"Keys": keys, **_MORE, "Commands (Tab completes them)": commands}


def _table(rows: list[tuple[str, str]]) -> Content:
    """Two columns; what is too long for the first has its second on the next line."""
    lines = []
    for name, text in rows:
        begin = "\n" + " " * _FIRST if len(name) >= _FIRST else " " * (_FIRST - len(name))
        wrapped = ("\n" + " " * _FIRST).join(textwrap.wrap(text, _SECOND))
        lines.append(Content.assemble((name, "$text-accent"), begin, wrapped))
    return Content("\n").join(lines)


def shown_keys(keys: str) -> str:
    """Keys as people write them: ``ctrl+o,f2`` is ``Ctrl-O, F2``."""
    return ", ".join(
        "-".join(
            _KEYS.get(part, part.upper() if len(part) <= 2 else part.capitalize()) for part in key.split("+")
        )
        for key in keys.split(",")
    )
