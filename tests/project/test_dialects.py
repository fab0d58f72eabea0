"""One way to write a docstring, and one to import: relative in a room, by the full name from another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

OUTSIDE = ("convert", "tui", "vendor", "bench", "patches")  # rooms beside the package's own folder


def modules() -> dict[str, str]:
    """Every module of the package by its dotted name, with its source."""
    found = {}
    for folder in ("mobile_gguf", *OUTSIDE):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "mobile_gguf" else ("mobile_gguf", *parts))
            found[name] = path.read_text(encoding="utf-8")
    return found


def room(module: str) -> str:
    """The first component below the package; modules beside the rooms are in one of their own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def statements(source: str) -> Iterator[ast.AST]:
    """A module and all statements in it; to go into expressions as well would take five times as long."""
    left: list[ast.AST] = [ast.parse(source)]
    while left:
        node = left.pop()
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            left += getattr(node, field, ())


def docstring_faults(source: str) -> list[str]:
    faults = []
    for node in statements(source):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is None:
                continue
            if text.startswith("\n"):
                faults.append(f"no text on the first line: {text.strip()[:40]!r}")
            if "`" in text.replace("``", ""):
                faults.append(f"single backticks: {text[:40]!r}")
    return faults


def import_faults(module: str, source: str, rooms: set[str]) -> list[str]:
    """Imports of the own room by its full name, and of another room by dots."""
    faults = []
    package = module.split(".")[:-1]  # a package's own module ends in __init__
    for node in statements(source):
        if not isinstance(node, ast.ImportFrom) or room(module) not in rooms:
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
            if len(base) < 2:
                faults.append(f"{module}: from {'.' * node.level}{node.module or ''}")
        elif (node.module or "").split(".")[:2] == ["mobile_gguf", room(module)]:
            faults.append(f"{module}: from {node.module}")
    return faults


def test_docstrings_have_one_dialect():
    found = {name: docstring_faults(source) for name, source in modules().items()}
    found |= {
        path.name: docstring_faults(path.read_text(encoding="utf-8"))
        for path in Path(ROOT / "tests").rglob("*.py")
    }
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_imports_have_one_dialect():
    everything = modules()
    rooms = {room(name) for name in everything if len(name.split(".")) > 2}
    assert len(rooms) > 10
    assert [
        fault for name, source in everything.items() for fault in import_faults(name, source, rooms)
    ] == []


@pytest.mark.parametrize(
    "planted",
    [
        '"""Says `what`."""',
        '"""\nSays what.\n"""',
        'if x:\n    class A:\n        def f():\n            """A `b`."""',
    ],
)
def test_a_planted_docstring_is_found(planted):
    assert docstring_faults(planted)


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("mobile_gguf.engine.rpc", "from mobile_gguf.engine.binding import Engine"),
        ("mobile_gguf.engine.rpc", "from ..errors import EngineError"),
        ("mobile_gguf.tui.store.models", "from ...errors import MobileError"),
        (
            "mobile_gguf.engine.rpc",
            "def f():\n    try:\n        from ..errors import EngineError\n    finally: ...",
        ),
    ],
)
def test_a_planted_import_is_found(module, planted):
    assert import_faults(module, planted, {"engine", "tui"})
