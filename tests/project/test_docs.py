"""The docs name files, functions and pages that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from places import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = ("mobile_gguf", "convert", "tui", "vendor", "bench", "patches", "tests", "docs")
# "file.py:function" and plain paths, in backticks
HOP = re.compile(rf"`((?:{'|'.join(SOURCES)})/[\w./-]+):(\w+)`")
# (vendor/llama.cpp is in the pinned source)
PATH = re.compile(rf"`((?:{'|'.join(SOURCES)})/(?!llama\.cpp)[\w./-]*)[`:]")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")


def missing_hops(text: str, root: Path = ROOT) -> list[str]:
    """The ``file:function`` of ``text`` that are not in the tree."""
    return [f"{path}:{name}" for path, name in HOP.findall(text) if name not in definitions(root / path)]


def definitions(path: Path) -> set[str]:
    """What a source file defines: functions, methods and classes; in C and C++ functions, by their heads."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)}
    return set(re.findall(r"^\S[^\n;(]*?\b(\w+)\s*\(", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_hops(text) == []
    assert [path for path in PATH.findall(text) if not (ROOT / path).exists()] == []
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_architecture_walks_name_their_hops() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    walks = re.split(r"^## ", text, flags=re.MULTILINE)
    hops = {walk.splitlines()[0]: len(HOP.findall(walk)) for walk in walks if walk.startswith("Life of")}
    assert len(hops) == 5
    assert min(hops.values()) >= 4, hops


def test_a_hop_that_is_gone_is_found(tmp_path: Path) -> None:
    (tmp_path / "tui").mkdir()
    (tmp_path / "tui/app.py").write_text("class App:\n    def run(self): ...\n")
    (tmp_path / "tui/x.cpp").write_text("bool store::go(int n) {\n    gone(n);\n}\n")
    text = "`tui/app.py:run` `tui/app.py:walk` `tui/none.py:run` `tui/x.cpp:go` `tui/x.cpp:gone`"
    assert missing_hops(text, tmp_path) == ["tui/app.py:walk", "tui/none.py:run", "tui/x.cpp:gone"]
