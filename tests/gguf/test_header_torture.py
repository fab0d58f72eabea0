"""A file with one change in its header ends ``show``, ``plan`` and ``run`` with an exit code and a line.

``make torture-headers`` tries all changes; here are some of each part of a header, and the worst of the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import header_torture
import pytest
import tiny_models
from header_changes import Header
from header_torture import End

N_CHANGES = 24  # of each header
NAMES = ("qwen3moe", "nemotron-h", "deepseek3")


@pytest.mark.parametrize("name", NAMES)
def test_some_changes_of_a_header(name: str) -> None:
    n = len(Header(tiny_models.path(name)).changes)
    step = n // N_CHANGES
    done = subprocess.run(
        [sys.executable, str(header_torture.__file__), name, "--every", str(step), "--first", str(step // 2)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[1]) >= N_CHANGES


def test_every_change_changes_the_file_and_nothing_but_its_header() -> None:
    header = Header(tiny_models.path("mixtral"))
    what = {change.what for change in header.changes}
    for wanted in (
        "the magic", "the number of tensors: ", "llama.expert_used_count: 2 becomes 3",
        "token_embd.weight, dimension 0: 96 becomes 97", "tokenizer.ggml.tokens empty",
        "token_embd.weight, its offset: ",
    ):  # fmt: skip
        assert any(text.startswith(wanted) for text in what), wanted
    for change in header.changes[::50]:
        changed = header.changed(change)
        assert changed != header.raw
        assert changed.endswith(header.data)
    assert header.raw.endswith(header.data)


@pytest.mark.parametrize(
    ("end", "fault"),
    [
        (End(0, ""), ""),
        (End(0, "mobile-gguf: note: a note\n2 big\n"), ""),
        (End(1, "mobile-gguf: note: a note\nmobile-gguf: error: so it is\n"), ""),
        (End(1, ""), "exit code 1 with 0 lines"),
        (End(1, "mobile-gguf: error: one\nmobile-gguf: error: two\n"), "exit code 1 with 2 lines"),
        (End(-6, "abort\n"), "exit code -6"),
        (End(3, "mobile-gguf: error: not there\n"), "exit code 3"),
        (End(1, "Traceback (most recent call last):\n"), "a traceback"),
        (End(0, "Exception ignored in: <function>\n"), "a traceback"),
    ],
    ids=str,
)
def test_what_counts_as_a_fault(end: End, fault: str) -> None:
    assert end.fault.startswith(fault)
    assert bool(end.fault) == bool(fault)


def test_a_command_that_dies_is_seen(tmp_path: Path) -> None:
    code = """
import json, os, sys, types
import header_torture
import mobile_gguf.cli
def main(arguments):
    if arguments[0] == "show":
        os.abort()
    if arguments[0] == "plan":
        raise ValueError("what nobody foresaw")
    return 0
mobile_gguf.cli.main = main
ends = {verb: header_torture.run_forked([verb]).fault for verb in ("show", "plan", "run")}
print(json.dumps(ends))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(str(header_torture.__file__)).parent)},
    )  # fmt: skip
    ends = json.loads(done.stdout)
    assert ends["show"].startswith("exit code -6")
    assert ends["plan"].startswith("exit code 70")
    assert ends["run"] == ""
