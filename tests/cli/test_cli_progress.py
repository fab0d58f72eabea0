"""Progress on stderr: one line that is rewritten and wiped on a terminal, a line a phase elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import sys

import pytest

from mobile_gguf.cli.progress import Progress, PromptProgress, StatusLine
from mobile_gguf.wording import cell_width, clipped


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")


def screen_of(written: str) -> list[str]:
    """What a terminal shows of it: carriage returns, line feeds and the erasing of a line obeyed."""
    lines, column = [""], 0
    for part in written.replace("\033[K", "\0"):
        line = lines[-1]
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
            column = 0
        elif part == "\0":
            lines[-1] = line[:column]
        else:
            lines[-1] = line[:column].ljust(column) + part + line[column + 1 :]
            column += 1
    return lines


def read_all(terminal: int) -> str:
    """What was written to a terminal whose other end is closed."""
    written = b""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 65536):
            written += data
    os.close(terminal)
    return written.decode()


def test_on_a_terminal_the_line_is_rewritten_and_wiped():
    stream, shown = Terminal(), []
    with Progress(stream) as progress:
        progress.show("loading a model with a long name")
        shown.append(screen_of(stream.getvalue()))
        progress("built", 0.5)
        shown.append(screen_of(stream.getvalue()))
        # what the terminal itself writes of a key is wiped as well
        stream.write("^C")
    assert shown == [["loading a model with a long name"], ["built  50%"]]
    assert screen_of(stream.getvalue()) == [""]


def test_a_line_has_no_more_than_the_terminals_columns():
    assert (cell_width("一丁e\u0301"), clipped("一丁x", 4), clipped("一丁", 3)) == (5, "一丁", "一")
    stream = Terminal()
    with StatusLine(stream) as line:
        line.show("loading /models/" + "一" * 40)
        assert cell_width(screen_of(stream.getvalue())[0]) <= 39


def test_a_load_is_seen_while_the_engine_has_the_descriptors():
    """llama-cpp-python leads 1 and 2 to /dev/null while it loads."""
    ours, theirs = pty.openpty()
    saved = os.dup(2)
    stream = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        os.dup2(theirs, 2)
        with Progress(stream) as progress:
            progress.show("loading a model with a long name.gguf")
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
            progress("loading", 0.12)
            os.dup2(theirs, 2)
        stream.write("the answer\n")
        stream.flush()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(theirs)
    written = read_all(ours)
    assert "loading  12%" in written
    assert screen_of(written) == ["the answer", ""]


def test_a_dumb_terminal_gets_lines_and_no_codes(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(stream) as progress:
        progress.show("loading demo")
        for done in (0.0, 0.05, 0.1, 1.0):
            progress("loading", done)
    with PromptProgress(stream) as progress:
        for done in (0, 4, 8):
            progress(done, 8)
    assert stream.getvalue().splitlines() == [
        "loading 0%",
        "loading 10%",
        "loading 100%",
        "reading the prompt: 0 of 8 tokens",
        "reading the prompt: 4 of 8 tokens",
    ]


def test_elsewhere_a_phase_is_said_once():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.show("loading")
        for phase in ("fetching", "building", "loading"):
            for done in (0.0, 0.5, 1.0):
                progress(phase, done)
    with PromptProgress(stream) as progress:
        progress(1, 2)
    assert stream.getvalue() == "fetching\nbuilding\n"


def test_a_prompt_is_seen_until_its_answer_begins(fake_load, monkeypatch, capsys):
    from mobile_gguf.cli import main

    fake_load()
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys.stdout, "write", lambda text: stream.write(text), raising=False)
    assert main(["run", "m.gguf", "--raw", "-n", "1", "four"]) == 0
    written = stream.getvalue()
    assert "reading the prompt: 0 of 5 tokens" in written
    assert "reading the prompt: 5 of 5 tokens" in written
    assert not any("reading" in line or "loading" in line for line in screen_of(written))
