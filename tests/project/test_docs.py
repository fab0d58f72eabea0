"""The docs, and comments in our C++, name files, functions and pages that are there."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
from places import C_SOURCES, ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = ("mobile_gguf", "convert", "tui", "vendor", "bench", "patches", "tests", "docs")
# "file.py:function" and plain paths, in backticks
HOP = re.compile(rf"`((?:{'|'.join(SOURCES)})/[\w./-]+):(\w+)`")
# (vendor/llama.cpp is in the pinned source)
PATH = re.compile(rf"`((?:{'|'.join(SOURCES)})/(?!llama\.cpp)[\w./-]*)[`:]")
# in a comment's running text; what lies in llama.cpp begins with other folders
IN_COMMENT = re.compile(rf"(?<![\w./-])(?:{'|'.join(SOURCES)})/[\w./-]*\w")
OF_OURS = re.compile(r"\bmobile-[\w-]+\.(?:h|cpp)\b")
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


def missing_in_comments(text: str, root: Path = ROOT) -> list[str]:
    """What a C or C++ file's comments name and is not there: paths, and files of ours by their names."""
    ours = {path.name for path in (root / C_SOURCES.relative_to(ROOT)).rglob("*")}
    comments = re.findall(r"//.*", text)
    paths = [path for line in comments for path in IN_COMMENT.findall(line) if not (root / path).exists()]
    return paths + [name for line in comments for name in OF_OURS.findall(line) if name not in ours]


def test_what_comments_of_our_sources_name_is_there() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in C_SOURCES.rglob("*") if path.is_file()}
    assert {path: gone for path, text in texts.items() if (gone := missing_in_comments(text))} == {}


def test_what_is_gone_and_named_in_a_comment_is_found() -> None:
    text = (
        '#include "tests/none.h"\n// see tests/none.py, tests/project/test_docs.py. and ggml/docs/none.md\n'
    )
    gone = "// mobile-none.h - a header\n// see mobile-ids.h (route/mobile-gone.cpp)\n"
    assert missing_in_comments(text + gone) == ["tests/none.py", "mobile-none.h", "mobile-gone.cpp"]


def walks() -> dict[str, list[str]]:
    """The paths of each walk of docs/architecture.md, in order: of its numbered steps."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    found = {}
    for walk in re.split(r"^## ", text, flags=re.MULTILINE):
        title, _, body = walk.partition("\n")
        if title.startswith("Life of"):
            steps = re.findall(r"^\d+\. .*?(?=^\d+\. |\n\n|\Z)", body, re.MULTILINE | re.DOTALL)
            found[title] = [path for step in steps for path, _name in HOP.findall(step)]
    return found


def room_of(path: str) -> str:
    """The room of a file: a folder of patches/src, of the package or of the repository, or the file."""
    parts = path.split("/")
    return "/".join(parts[: {"patches": 3, "mobile_gguf": 2}.get(parts[0], 1)])


def entered_twice(paths: list[str]) -> list[str]:
    """Rooms that a walk comes back to."""
    rooms = [room for room, _of in itertools.groupby(map(room_of, paths))]
    return sorted({room for room in rooms if rooms.count(room) > 1})


def test_walks_name_their_hops_and_enter_no_room_twice() -> None:
    found = walks()
    assert len(found) == 13
    assert all(len(paths) >= 4 for paths in found.values()), found
    assert {title: twice for title, paths in found.items() if (twice := entered_twice(paths))} == {}


def test_a_room_that_is_entered_twice_is_found() -> None:
    paths = ["tui/app.py", "tui/screens/chat.py", "mobile_gguf/api/model.py", "mobile_gguf/api/aio.py"]
    assert entered_twice(paths) == []
    assert entered_twice([*paths, "tui/app.py"]) == ["tui"]
    assert entered_twice(["patches/src/store/a.cpp", "patches/src/route/b.cpp"]) == []


def test_a_hop_that_is_gone_is_found(tmp_path: Path) -> None:
    (tmp_path / "tui").mkdir()
    (tmp_path / "tui/app.py").write_text("class App:\n    def run(self): ...\n")
    (tmp_path / "tui/x.cpp").write_text("bool store::go(int n) {\n    gone(n);\n}\n")
    text = "`tui/app.py:run` `tui/app.py:walk` `tui/none.py:run` `tui/x.cpp:go` `tui/x.cpp:gone`"
    assert missing_hops(text, tmp_path) == ["tui/app.py:walk", "tui/none.py:run", "tui/x.cpp:gone"]
