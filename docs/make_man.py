"""Write docs/mobile-gguf.1, the manual page, from the parser of the command line.

Run by ``make docs``; a test proves that the page is up to date.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from mobile_gguf import __version__
from mobile_gguf.cli import make_parser
from mobile_gguf.config import VERBS

PAGE = Path(__file__).with_name("mobile-gguf.1")
CHANGELOG = PAGE.parents[1] / "CHANGELOG.md"
# groups that several verbs share are told once, in this order; by the titles of argparse's groups
SHARED = {
    "load options": "OPTIONS OF LOADING",
    "generate options": "OPTIONS OF ANSWERS",
    "serve options": "OPTIONS OF A SERVER",
}
EXIT = {
    "0": "all went well",
    "1": "it failed",
    "2": "the command cannot be meant",
    "3": "there is no such model",
    "4": "the engine is missing, does not fit or failed",
    "130": "interrupted by Ctrl-C",
}
ENVIRONMENT = {
    "MOBILE_GGUF_NAME": "a default for the option NAME, such as MOBILE_GGUF_RAM_BUDGET=40%",
    "XDG_CONFIG_HOME, XDG_DATA_HOME, XDG_CACHE_HOME, XDG_RUNTIME_DIR": "where the files below are",
    "HF_TOKEN, HF_HOME, HF_HUB_OFFLINE": "as the Hugging Face Hub's own programs understand them",
    "NO_COLOR": "no colours",
}
FILES = {
    "~/.config/mobile-gguf/config.toml": "defaults of options, for all verbs or for one",
    "~/.config/mobile-gguf/presets/NAME.toml": "what --preset NAME says",
    "~/.local/share/mobile-gguf/models": "models that are run by their names",
    "~/.local/share/mobile-gguf/conversations.db": "conversations of the chat on a screen",
    "~/.cache/mobile-gguf/sessions": "what models computed of conversations",
}


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def released(changelog: str, version: str) -> str:
    """The day that ``version`` was released, by its heading in the changelog; empty before it is."""
    found = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    return found[1] if found else ""


def page() -> str:
    """The whole page in man(7)'s language."""
    parser = make_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    shared: dict[str, list[argparse.Action]] = {title: [] for title in SHARED}
    day = released(CHANGELOG.read_text(encoding="utf-8"), __version__)
    lines = [
        '.\\" made by docs/make_man.py of the parser; do not edit',
        f'.TH MOBILE-GGUF 1 "{day}" "mobile-gguf {__version__}" "User commands"',
        # commands are copied from here: no hyphens that nobody types
        ".nh",
        ".ad l",
        ".SH NAME",
        f"mobile-gguf \\- {_text('run Mixture-of-Experts models that do not fit into memory')}",
        ".SH SYNOPSIS",
        ".B mobile-gguf",
        '.RI [ VERB ] " " [ OPTIONS ]',
        ".SH DESCRIPTION",
        _text(parser.description or ""),
        _text("Without a verb, on a terminal, it is the chat. Answers go to stdout, all else to stderr."),
        ".SH VERBS",
    ]
    for verb in VERBS:
        lines += _verb(verb, verbs.choices[verb], shared)
    for title, heading in SHARED.items():
        lines += [f".SH {heading}", *_options(shared[title])]
    lines += [".SH EXIT STATUS", *_terms(EXIT)]
    lines += [".SH ENVIRONMENT", *_terms(ENVIRONMENT)]
    lines += [".SH FILES", *_terms(FILES)]
    return "\n".join(lines) + "\n"


def _verb(
    verb: str, parser: argparse.ArgumentParser, shared: dict[str, list[argparse.Action]]
) -> Iterator[str]:
    yield f".SS {_text(verb)}"
    yield f".B {_text((parser.usage or parser.prog).removesuffix(' [OPTIONS]'))}"
    yield ".PP"
    yield _text(parser.description or "")
    also = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _is_shown(action)]
        if group.title in shared and actions:
            known = {action.dest for action in shared[group.title]}
            shared[group.title] += [action for action in actions if action.dest not in known]
            also.append(SHARED[group.title])
        else:
            yield from _options(actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from (".TP", f".B {_text(f'{verb} {name}')}", _text(child.description or ""))
                yield from (".RS", *_options(filter(_is_shown, child._actions)), ".RE")
    if also:
        yield ".PP"
        yield _text(f"It takes what is under {' and '.join(also)} as well.")
    examples = [line for line in (parser.epilog or "").splitlines() if line.startswith("  ")]
    if examples:
        yield from (
            ".PP",
            ".nf",
            *(_text(line) for line in textwrap.dedent("\n".join(examples)).splitlines()),
        )
        yield ".fi"


def _is_shown(action: argparse.Action) -> bool:
    skipped = isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
    return not skipped and action.help is not argparse.SUPPRESS


def _options(actions: Iterable[argparse.Action]) -> Iterator[str]:
    for action in actions:
        name = str(
            action.metavar
            or (("{" + ",".join(map(str, action.choices)) + "}") if action.choices else action.dest.upper())
        )
        takes = "" if action.nargs == 0 else f"\\fI{_text(name)}\\fR"
        if action.option_strings:
            flags = ", ".join(f"\\fB{_text(flag)}\\fR" for flag in action.option_strings)
            head = f"{flags}[={takes}]" if action.nargs == "?" else f"{flags} {takes}".rstrip()
        else:
            head = takes
        yield from (".TP", head, _text((action.help or "") % vars(action) if action.help else ""))


def _terms(terms: dict[str, str]) -> Iterator[str]:
    for term, text in terms.items():
        yield from (".TP", f".B {_text(term)}", _text(text))


def _text(text: str) -> str:
    """Running text as roff reads it, in lines of its own."""
    wrapped = textwrap.wrap(
        _escaped(" ".join(text.split())), 78, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(re.sub(r"^(?=\.)", r"\\&", line) for line in wrapped)


def _escaped(text: str) -> str:
    """Text whose hyphens are those that are typed, and that is no request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return re.sub(r"^\.", r"\\&.", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
