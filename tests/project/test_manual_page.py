"""The manual page: up to date, complete, and as its readers want it."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

from mobile_gguf.config import VERBS

SCRIPT, PAGE = ROOT / "docs/make_man.py", ROOT / "docs/mobile-gguf.1"


@pytest.fixture(scope="module")
def make_man() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_man", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(make_man: ModuleType) -> None:
    assert make_man.page() == PAGE.read_text(encoding="utf-8"), "run `make docs`"


def test_every_verb_and_flag_is_on_it(make_man: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"\n.SS {verb}\n" not in text] == []
    flags = ("--preset", "--attach", "--ram-budget", "--temp", "--port", "--continue", "--names")
    shown = [flag for flag in flags if f"\\fB{flag.replace('-', chr(92) + '-')}\\fR" in text]
    assert shown == list(flags[:-1])  # the last is for completion alone
    assert text.count("\\fB\\-\\-top\\-k\\fR") == 1  # shared by verbs, and told once


def test_words_that_look_like_requests_are_text(make_man: ModuleType) -> None:
    assert make_man._text("a\n.b 'c' \\d --e") == "a .b \\(aqc\\(aq \\ed \\-\\-e"
    assert make_man._text(".b") == "\\&.b"


def test_mandoc_finds_nothing(tmp_path: Path) -> None:
    lint = ["mandoc", "-Tlint", "-Wwarning"]
    found = subprocess.run([*lint, str(PAGE)], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    (tmp_path / "bad.1").write_text(PAGE.read_text(encoding="utf-8") + ".XX\n", encoding="utf-8")
    assert subprocess.run([*lint, str(tmp_path / "bad.1")], capture_output=True).returncode != 0
