"""What a phase has found, on disk after every step: a cut loses at most the step that it hits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Save = Callable[[], None]
Page = Callable[[dict[str, Any]], list[str]]


def write_text(path: Path, text: str) -> None:
    """The whole file or the one before: never half of it."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def save_result(folder: Path, name: str, result: dict[str, Any], page: Page) -> None:
    """NAME.json, and NAME.md to read."""
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    state = "" if result["finished"] else "Not finished: this is what was there when it ended.\n"
    error = f"Error: {result['error']}\n" if result.get("error") else ""
    lines = [f"# {result['title']}", "", *filter(None, [state, error]), *page(result), ""]
    write_text(folder / f"{name}.md", "\n".join(lines))


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """What a phase left; None if it never wrote."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
