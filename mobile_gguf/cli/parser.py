"""The command line's parser: errors of one line, help that fits a screen, and hints for what is misspelt."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mobile_gguf.options.words import AUTO, OFF, ON

PROGRAM = "mobile-gguf"
EXIT_USAGE = 2

_EXAMPLES = "examples:"
_CHOICE = re.compile(r"argument (?P<name>\S+): invalid choice: '(?P<given>.*)' \(choose from (?P<known>.*)\)")

# What each verb's help ends with.
EXAMPLES = {
    "run": (
        'mobile-gguf run demo "Why is the sky blue?"',
        'mobile-gguf run --continue demo "And at night?"',
        'mobile-gguf run demo "What is wrong in @notes.txt?"',
        'mobile-gguf run --preset coder "Write a sort in C"',
        "mobile-gguf run model.gguf -f question.txt --ram-budget 40%",
        "git diff | mobile-gguf run model.gguf -q --system 'Write a commit message'",
        "mobile-gguf run model.gguf --batch in.jsonl --out out.jsonl",
    ),
    "chat": (
        "mobile-gguf chat",
        "mobile-gguf chat model.gguf --ram-budget 6G",
        "mobile-gguf chat --attach http://127.0.0.1:8080",
        "mobile-gguf chat --plain demo",
    ),
    "serve": (
        "mobile-gguf serve demo --port 0",
        "mobile-gguf serve model.gguf --host 0.0.0.0 --api-key-file key.txt",
    ),
    "plan": ("mobile-gguf plan model.gguf", "mobile-gguf plan hf:ORG/REPO:Q4_K_M -c 8192 --json"),
    "list": ("mobile-gguf list --paths",),
    "show": ("mobile-gguf show demo", "mobile-gguf show hf:ORG/REPO:Q4_K_M --json"),
    "rm": ("mobile-gguf rm hf:ORG/REPO:Q4_K_M", "mobile-gguf rm --yes old-model"),
    "sessions": (
        "mobile-gguf sessions",
        "mobile-gguf sessions show trip",
        "mobile-gguf sessions export last --out chat.md",
        "mobile-gguf sessions rm --yes",
    ),
    "calibrate": (
        "mobile-gguf calibrate model.mobile.gguf",
        "mobile-gguf calibrate model.gguf --text mine.txt --out calibrated.gguf",
    ),
    "bench": ("mobile-gguf bench --budget 12%,25% --modes exact,little",),
    "engine": (
        "mobile-gguf engine build",
        "mobile-gguf engine build --backend cuda",
        "mobile-gguf engine info",
        "mobile-gguf engine rpc-server --port 50052",
    ),
    "doctor": ("mobile-gguf doctor", "mobile-gguf doctor --json"),
    "config": (
        "mobile-gguf config demo --for serve",
        "mobile-gguf config --preset coder",
        "MOBILE_GGUF_MODE=little mobile-gguf config --json",
    ),
    "ps": ("mobile-gguf ps", "mobile-gguf ps --json"),
    "stop": ("mobile-gguf stop", "mobile-gguf stop demo"),
    "embed": (
        'mobile-gguf embed demo "a text" "another text"',
        "mobile-gguf embed model.gguf -f lines.txt --format npy --out vectors.npy",
    ),
    "completion": (
        'eval "$(mobile-gguf completion bash)"',
        "mobile-gguf completion zsh > ~/.zfunc/_mobile-gguf",
        "mobile-gguf completion fish > ~/.config/fish/completions/mobile-gguf.fish",
    ),
    "help": ("mobile-gguf help run",),
}


class HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLES):
            return text
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._with_values(words), namespace)

    def _with_values(self, words: list[str]) -> list[str]:
        """Give flags that may stand alone their value: argparse would take the word behind for it."""
        end = words.index("--") if "--" in words else len(words)
        made = []
        for at, word in enumerate(words[:end]):
            known = vars(self._option_string_actions.get(word, self))
            bare = known["const"] if known.get("stands_alone") else known.get("bare")
            follows = words[at + 1].lower() if at + 1 < end and not known.get("stands_alone") else ""
            made += [word, bare] if bare and follows not in (ON, OFF, AUTO) else [word]
        return made + words[end:]

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split())
        self.exit(EXIT_USAGE, usage_line(_with_hint(text), self.prog.removeprefix(PROGRAM).strip()))


def usage_line(text: str, verb: str | None) -> str:
    """An error of the command line, with where its help is."""
    program = f"{PROGRAM} {verb}" if verb else PROGRAM
    return f"{PROGRAM}: error: {text} (see `{program} --help`)\n"


def _with_hint(text: str) -> str:
    found = _CHOICE.fullmatch(text)
    if found is None:
        return text
    known = re.findall(r"[\w.-]+", found["known"])
    near = difflib.get_close_matches(found["given"], known, 1)
    if found["name"] == "VERB":
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(dict.fromkeys(known))}"
        return f"there is no verb {found['given']!r}; {hint}"
    return f"{text}; did you mean {near[0]}?" if near else text


def finish(subparsers: argparse._SubParsersAction[Any]) -> None:
    """What all verbs have alike: --quiet, a usage of one line, examples."""
    for verb, parser in subparsers.choices.items():
        if parser.usage is not None:
            continue  # the same under another name
        if "-q" not in parser._option_string_actions:
            parser.add_argument(
                "-q", "--quiet", action="store_true", help="no receipt and no progress on stderr"
            )
        words = [word for action in parser._actions if not action.option_strings for word in _words(action)]
        parser.usage = " ".join([f"{PROGRAM} {verb}", *words, "[OPTIONS]"])
        _add_examples(parser, EXAMPLES.get(verb, ()))
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    begin = f"{PROGRAM} {verb} {name}"
                    _add_examples(child, [line for line in EXAMPLES[verb] if line.startswith(begin)])


def _add_examples(parser: argparse.ArgumentParser, examples: Sequence[str]) -> None:
    if examples and not parser.epilog:
        parser.epilog = "\n  ".join([_EXAMPLES, *examples])
        parser.formatter_class = HelpFormatter


def _words(action: argparse.Action) -> list[str]:
    name = str(action.metavar or action.dest)
    if isinstance(action, argparse._SubParsersAction) or vars(action).get("is_needed"):
        return [name]
    return {"?": [f"[{name}]"], "*": [f"[{name} ...]"], "+": [f"{name} [...]"]}.get(str(action.nargs), [name])
