"""Answers under a schema where experts are missing: valid at every rung, and a wrong one is seen."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import tiny_models

from mobile_gguf.bench import schema_loss

GOOD = {"name": "a", "kind": "tool", "count": 3, "is_old": False, "parts": ["b"]}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x" * 13}, {"kind": "thing"}, {"count": 1000}, {"count": True}, {"count": 1.5},
        {"is_old": 0},
        {"parts": ["a", "b", "c"]}, {"parts": ["x" * 9]}, {"parts": "a"}, {"more": 1},
    ],
)  # fmt: skip
def test_what_breaks_the_schema_is_named(change) -> None:
    assert schema_loss.wrong_in(GOOD) == ""
    value = {**GOOD, **change}
    assert schema_loss.wrong_in(value)
    assert not jsonschema.Draft202012Validator(schema_loss.SCHEMA).is_valid(value)


def test_every_rung_keeps_the_form(tmp_path: Path) -> None:
    model = str(tiny_models.path("olmoe"))
    assert schema_loss.main([model, "--budget", "60%", "--prompts", "2", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "schema_loss.json").read_text())
    assert [row["rung"] for row in record["rows"]] == list(schema_loss.RUNGS)
    assert all(row["answers"] == 2 for row in record["rows"])
    assert sum(row["ended"] for row in record["rows"]) > 0


def test_an_answer_that_breaks_it_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schema_loss, "KINDS", ())
    assert schema_loss.main([str(tiny_models.path("olmoe")), "--budget", "60%", "--prompts", "1"]) == 1
    assert "breaks the schema: kind" in capsys.readouterr().err
