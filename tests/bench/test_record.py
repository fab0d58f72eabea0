"""What measuring modules keep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mobile_gguf.bench.record import begin_record, keep_record


def test_the_command_is_one_that_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["busy.py", "a trace", "--rounds", "2"])
    assert begin_record("busy", None)["command"] == "python -m mobile_gguf.bench.busy 'a trace' --rounds 2"
    assert begin_record("busy", [])["command"] == "python -m mobile_gguf.bench.busy"
    assert "cores" in begin_record("busy", [])["hardware"]


def test_a_record_is_a_page_and_its_figures(tmp_path: Path) -> None:
    keep_record(None, "busy", {}, "")
    keep_record(tmp_path / "new" / "folder", "busy", {"rounds": 2}, "# Page\n")
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "busy.json").read_text()) == {"rounds": 2}
    assert (folder / "busy.md").read_text() == "# Page\n"
    assert sorted(path.name for path in folder.iterdir()) == ["busy.json", "busy.md"]
