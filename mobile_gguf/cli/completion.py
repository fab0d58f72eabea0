"""``mobile-gguf completion``: what bash, zsh and fish need to complete this command line.

shtab makes the script of the parser; names of models, presets and the like are asked of this verb when they
are wanted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mobile_gguf.api.last_conversation import conversation_names
from mobile_gguf.config import preset_names
from mobile_gguf.errors import EngineError, UsageError, install_hint
from mobile_gguf.files.paths import sessions_dir
from mobile_gguf.files.running import SERVE, running
from mobile_gguf.hub.reference import PREFIX
from mobile_gguf.hub.resolve import DEMO, local_models, model_name

from .parser import PROGRAM
from .sessions_words import known_names

SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """Print the script by which a shell completes this command: verbs, flags, their words, models,
presets and sessions. Load it once, or write it to where the shell looks for such scripts."""
_SHOWN = 12  # characters of a session's name, as `sessions` shows them


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "completion", help="print a shell's completion", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("shell", metavar="SHELL", nargs="?", choices=SHELLS, help=", ".join(SHELLS))
    # for the scripts
    parser.add_argument("--names", choices=tuple(_NAMES), help=argparse.SUPPRESS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    if args.names is not None:
        sys.stdout.write("".join(f"{name}\n" for name in _NAMES[args.names]()))
        return 0
    if args.shell is None:
        raise UsageError(f"a shell is needed: {', '.join(SHELLS)}")
    from . import make_parser

    print(script(make_parser(), args.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion of ``shell``, made of the parser. Raises EngineError without shtab."""
    try:
        import shtab
    except ImportError:
        raise EngineError(f"completion needs shtab: {install_hint('')}") from None
    for each in _parsers(parser):
        for action in each._actions:
            if words := vars(action).get("words"):
                action.choices = words
            completed = _completed(action, shtab)
            if completed is not None:
                vars(action)["complete"] = completed
    return shtab.complete(parser, shell=shell)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for listed in action._choices_actions:
                action.choices[listed.dest].description = listed.help  # the short one
            for child in dict.fromkeys(action.choices.values()):
                yield from _parsers(child)


def _completed(action: argparse.Action, shtab: Any) -> dict[str, Any] | None:
    """How the words of an argument are completed; None: by its choices, or not at all."""
    kind = vars(action).get("completes") or ("models" if action.metavar == "MODEL" else None)
    if kind is not None:
        return _asked(kind, with_files=kind == "models")
    if action.choices or action.nargs == 0:
        return None
    if action.metavar in ("FILE", "PATH"):
        return shtab.FILE
    return shtab.DIRECTORY if action.metavar in ("DIR", "FOLDER") else None


def _asked(kind: str, *, with_files: bool) -> dict[str, Any]:
    """Names of a kind, asked of the program, and for models the files that have their ending."""
    function, ask = f"_mobile_gguf_{kind}", f"{PROGRAM} completion --names {kind} 2>/dev/null"
    # a colon divides words for bash: what stands before it is typed already
    bash = [f'local word="$1" names; names="$({ask})"', 'compgen -W "$names" -- "$word"']
    zsh = [f'local -a names; names=("${{(@f)$({ask})}}")', "(( ${#names} )) && compadd -a names"]
    fish = f"({ask})"
    if with_files:
        bash += ["compgen -f -X '!*.gguf' -- \"$word\"", 'compgen -d -- "$word"']
        zsh += ["_files -g '*.gguf'"]
        fish = f"({ask}; __fish_complete_suffix .gguf)"
    return {
        "bash": function,
        "zsh": function,
        "fish": fish,
        "preamble": {
            "bash": f"{function}() {{\n  " + "\n  ".join(bash) + "\n}",
            "zsh": f"{function}() {{\n  " + "\n  ".join(zsh) + "\n}",
        },
    }


def _models() -> list[str]:
    return [DEMO, *map(model_name, local_models()), PREFIX]


def _sessions() -> list[str]:
    try:
        states = sorted(path.stem[:_SHOWN] for path in sessions_dir().glob("*.session"))
    except OSError:
        states = []
    return [*known_names(), *states]


def _servers() -> list[str]:
    return [str(name) for one in running() if one.kind == SERVE for name in (one.facts.get("model"), one.pid)]


_NAMES: dict[str, Callable[[], list[str]]] = {
    "models": _models,
    "presets": preset_names,
    "conversations": conversation_names,
    "sessions": _sessions,
    "servers": _servers,
}
