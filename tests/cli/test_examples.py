"""Every example in a help text is a command that the parser understands."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from mobile_gguf.cli import make_parser, parse
from mobile_gguf.config import VERBS

ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def epilog_of(verb: str) -> str:
    parser = make_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices[verb].epilog or ""


def commands(text: str) -> list[list[str]]:
    """The command lines in a text: a line each, continued by a backslash, without what a shell adds."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        at = line.find("mobile-gguf ")
        if at >= 0:
            words = shlex.split(line[at:].split(')"')[0], comments=True)
            ends = [words.index(word) for word in (">", "|") if word in words]
            found.append(words[1 : min(ends, default=len(words))])
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_examples_can_be_parsed(verb: str) -> None:
    examples = commands(epilog_of(verb))
    assert 1 <= len(examples) <= 7
    for words in examples:
        args = parse(make_parser(), words)
        assert args.verb in (verb, "help"), words
    assert any(words[:1] == [verb] for words in examples)


def test_those_of_the_program_itself() -> None:
    for words in commands(make_parser().epilog or ""):
        parse(make_parser(), words)


_PAGES = ("README.md", "docs/cli.md", "docs/tui.md", "docs/sessions.md", "docs/config.md")


@pytest.mark.parametrize("page", _PAGES)
def test_those_of_a_page(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = _FENCED.findall(text)
    indented = re.findall(r"(?:^    .*\n)+", _FENCED.sub("", text), re.MULTILINE)
    blocks = [block for language, block in fenced if language in ("", "sh")] + indented
    for words in (words for block in blocks for words in commands(block)):
        if not any(word in ("[OPTIONS]", "...") for word in words):
            parse(make_parser(), words)


@pytest.mark.parametrize("words", ["run demo --none hi", "engine nothing", "embed m --format xml a"])
def test_a_flag_that_does_not_exist_is_found(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (made,) = commands(f"  mobile-gguf {words}  # a comment")
    with pytest.raises(SystemExit):
        parse(make_parser(), made)


def test_a_verb_of_a_verb_has_examples_as_well() -> None:
    top = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    found = []
    for verb, parser in top.choices.items():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    examples = commands(child.epilog or "")
                    assert examples, (verb, name)
                    assert all(words[:2] == [verb, name] for words in examples)
                    found.append(name)
    assert {"show", "export", "rm", "build", "info", "rpc-server"} <= set(found)
