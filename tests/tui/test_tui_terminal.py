"""The real program in a real terminal: tmux, the real engine, the demo model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid

import pytest

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux to run a terminal in")


class Terminal:
    """A tmux session of its own server, so that nobody else's is touched."""

    def __init__(self, directory, columns, lines):
        self._socket = f"mobile-gguf-{uuid.uuid4().hex[:8]}"
        self._directory = directory
        self._size = columns, lines

    def tmux(self, *arguments):
        return subprocess.run(
            ["tmux", "-L", self._socket, "-f", "/dev/null", *arguments], capture_output=True, text=True
        )

    def start(self, command):
        columns, lines = map(str, self._size)
        # the shell stays, so that the exit code can be read
        started = self.tmux("new-session", "-d", "-x", columns, "-y", lines, f"{command}; echo EXIT=$?; cat")
        assert started.returncode == 0, started.stderr

    def screen(self):
        return self.tmux("capture-pane", "-p").stdout

    def keys(self, *keys):
        self.tmux("send-keys", *keys)

    def wait(self, text, seconds=300):
        deadline = time.monotonic() + seconds
        while text not in self.screen():
            assert time.monotonic() < deadline, f"no {text!r} on the screen:\n{self.screen()}"
            time.sleep(0.1)

    def kill(self):
        self.tmux("kill-server")


@pytest.fixture
def terminal(tmp_path):
    made = Terminal(tmp_path, 80, 24)
    yield made
    made.kill()


def command(*argv):
    """A command line with the directories of the test."""
    names = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "MOBILE_GGUF_ENGINE_CACHE")
    variables = " ".join(f"{name}={os.environ[name]}" for name in names)
    return f"env {variables} {sys.executable} -m mobile_gguf {' '.join(map(str, argv))}"


def test_a_chat_with_the_demo_model(terminal, demo_gguf, tmp_path):
    (tmp_path / "endless.gbnf").write_text("root ::= [a-z ] root")
    flags = ["--ram-budget", "40%", "-n", "10", "-t", "1", "--grammar-file", tmp_path / "endless.gbnf"]
    terminal.start(command("chat", demo_gguf, *flags))
    terminal.wait("exact")
    terminal.keys("-l", "Name three colours.")
    terminal.keys("Enter")
    terminal.wait("hits")
    assert "Name three colours." in terminal.screen()
    terminal.keys("C-g")
    terminal.wait("30 layers x 16 experts")
    terminal.keys("-l", "/set n_predict -1")
    terminal.keys("Enter")
    terminal.keys("-l", "Count to one thousand, number by number.")
    terminal.keys("Enter")
    terminal.wait("Esc stops")
    terminal.tmux("resize-window", "-x", "120", "-y", "36")
    terminal.keys("C-q")
    terminal.wait("EXIT=0")


def test_ctrl_z_in_an_answer_gives_the_terminal_back_and_fg_goes_on(terminal, demo_gguf):
    terminal.start("env PS1='shell> ' bash --norc -i")
    terminal.wait("shell>")
    terminal.keys("-l", command("chat", demo_gguf, "-n", "60", "-t", "1", "--seed", "1"))
    terminal.keys("Enter")
    terminal.wait("exact")
    terminal.keys("-l", "Count to one hundred.")
    terminal.keys("Enter")
    terminal.wait("tok/s")
    terminal.keys("C-z")
    terminal.wait("Stopped")
    terminal.keys("-l", "stty -a | grep -o ' isig'; bg")
    terminal.keys("Enter")
    terminal.wait(" isig")  # the terminal is the shell's, as it was
    terminal.keys("-l", "fg")
    terminal.keys("Enter")
    terminal.wait("Enter sends")
    terminal.wait("hits")  # the receipt of the answer, which went on
    terminal.keys("C-q")
    terminal.wait("shell>")
