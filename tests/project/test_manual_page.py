"""The manual page: up to date, complete, and as its readers want it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from page_makers import page_maker
from places import ROOT

from mobile_gguf.config import VERBS

PAGE = ROOT / "docs/mobile-gguf.1"


@pytest.fixture(scope="module")
def make_man() -> ModuleType:
    return page_maker("make_man")


def test_page_is_up_to_date(make_man: ModuleType) -> None:
    assert make_man.page() == PAGE.read_text(encoding="utf-8"), "run `make docs`"


def test_every_verb_and_flag_is_on_it(make_man: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"\n.SS {verb}\n" not in text] == []
    flags = ("--preset", "--attach", "--ram-budget", "--temp", "--port", "--continue", "--names")
    shown = [flag for flag in flags if f"\\fB{flag.replace('-', chr(92) + '-')}\\fR" in text]
    assert shown == list(flags[:-1])  # the last is for completion alone
    assert text.count("\\fB\\-\\-top\\-k\\fR") == 1  # shared by verbs, and told once


def test_a_value_that_may_be_left_out_stands_in_brackets() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "\n\\fB\\-\\-continue\\fR[=\\fINAME\\fR]\n" in text
    assert "\\-\\-continue\\fR \\fINAME" not in text


def test_what_is_copied_is_not_hyphenated() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert -1 < text.find("\n.nh\n") < text.index(".SH")


def test_words_that_look_like_requests_are_text(make_man: ModuleType) -> None:
    assert make_man._text("a\n.b 'c' \\d --e") == "a .b \\(aqc\\(aq \\ed \\-\\-e"
    assert make_man._text(".b") == "\\&.b"


def test_its_day_is_that_of_the_release(make_man: ModuleType) -> None:
    text = "## [Unreleased]\n\n## [0.2.0] - 2027-03-04\n\n## [0.1.0] - 2026-12-01\n"
    assert make_man.released(text, "0.1.0") == "2026-12-01"
    assert make_man.released(text, "0.2.0") == "2027-03-04"
    assert make_man.released(text, "0.3.0") == make_man.released(text, "0.1") == ""


def test_mandoc_finds_nothing(tmp_path: Path) -> None:
    def problems(text: str) -> list[str]:
        path = tmp_path / "page.1"
        path.write_text(text, encoding="utf-8")
        found = subprocess.run(["mandoc", "-Tlint", "-Wwarning", str(path)], capture_output=True, text=True)
        # a version that is not released yet has no day
        return [line for line in found.stdout.splitlines() if "missing date" not in line]

    text = PAGE.read_text(encoding="utf-8")
    assert problems(text) == []
    assert len(problems(text + ".XX\n")) == 1
