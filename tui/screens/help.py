"""The help screen: keys and commands, made from the bindings and the table of commands."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Footer, Markdown

from ..slash import COMMANDS
from .dialog import Dialog

_KEYS = {"up": "Up", "pageup": "Page-Up", "pagedown": "Page-Down"}
_MORE = """
In the transcript (Tab moves there): `e` edits a question, `c` copies, `b` copies the next code block, `r`
answers again. `Tab` completes a command. The mouse works everywhere; Shift selects text for the terminal.

The map: a row for each layer, a column for each expert. `█` hit, `◆` device hit, `X` missed, `+` loading,
`▒` `x` hit or missed a moment ago, `░` in RAM, `▓` on a device (GPU or RPC server), `·` on disk only. Where
several experts share a cell, the latest event wins.
"""


class Help(Dialog[None]):
    """Lists every key and every command."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Help"
            with VerticalScroll():
                yield Markdown(help_markdown())
        yield Footer(show_command_palette=False)


def help_markdown() -> str:
    """Keys and commands as Markdown tables."""
    from ..app import ChatApp
    from ..widgets.prompt import Prompt
    from .chat import ChatScreen

    bindings = [
        item
        for source in (Prompt, ChatScreen, ChatApp)
        for item in source.BINDINGS
        if isinstance(item, Binding) and item.tooltip
    ]
    keys = "\n".join(f"| {shown_keys(item.key)} | {item.tooltip} |" for item in bindings)
    commands = "\n".join(
        f"| `{item.name} {item.argument}`".rstrip("` ") + f"` | {item.help} |" for item in COMMANDS
    )
    return f"| Key | |\n|---|---|\n{keys}\n{_MORE}\n| Command | |\n|---|---|\n{commands}\n"


def shown_keys(keys: str) -> str:
    """Keys as people write them: ``ctrl+o,f2`` is ``Ctrl-O, F2``."""
    return ", ".join(
        "-".join(
            _KEYS.get(part, part.upper() if len(part) <= 2 else part.capitalize()) for part in key.split("+")
        )
        for key in keys.split(",")
    )
