"""The command line's parser: errors of one line, help that fits a screen, and hints for what is misspelt."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
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

    _words: Sequence[str] = ()  # of the command line, as far as this parser has seen them

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._words = words = list(sys.argv[1:] if args is None else args)
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
        said = f"{_with_hint(' '.join(message.split()))} (see `{self.prog} --help`)"
        if "--json" in _before_words(self._words):
            print_error_object("UsageError", said, EXIT_USAGE)
        self.exit(EXIT_USAGE, f"{PROGRAM}: error: {said}\n")

    def refuse_words(self, words: Sequence[str]) -> NoReturn:
        """End with an error for words that are too many: the options among them, and what they may mean."""
        options = [word.partition("=")[0] for word in _before_words(words) if is_option(word)]
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        meant = [name.lstrip("-").replace("_", "-") for name in options]
        near = [f"--{flag}" for name in meant for flag in difflib.get_close_matches(name, flags, 1, 0.75)]
        hint = f"; did you mean {' '.join(near)}?" if near else ""
        self.error(f"unrecognized arguments: {' '.join(options or words)}{hint}")


def parser_named(parser: Parser, args: argparse.Namespace) -> Parser:
    """The parser of the verb, and of the verb in a verb, that a command line names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            name = getattr(args, action.dest, None)
            return parser_named(action.choices[name], args) if name in action.choices else parser
    return parser


def is_option(word: str) -> bool:
    """Whether a word of a command line begins as an option does."""
    return len(word) > 1 and word[0] == "-"


def _before_words(words: Sequence[str]) -> Sequence[str]:
    """What of a command line may be options: what stands before ``--``."""
    return words[: words.index("--")] if "--" in words else words


def print_error_object(kind: str, message: str, exit_code: int) -> None:
    """What --json prints of an error, on standard output."""
    said = {"type": kind, "message": message, "exit_code": exit_code}
    with contextlib.suppress(OSError):
        print(json.dumps({"error": said}), flush=True)


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
