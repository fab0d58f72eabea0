"""Completion in real shells, each on a terminal: what Tab makes of a line that is then run."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mobile_gguf.api.conversation import Conversation
from mobile_gguf.api.last_conversation import remember
from mobile_gguf.cli import completion, main, make_parser
from mobile_gguf.config import presets_dir
from mobile_gguf.files.paths import models_dir, runtime_dir

pytestmark = pytest.mark.slow

_READY = "READY>"
_SECONDS = 300
_ASKED_KIND = re.compile(rb"\033\[0?c")  # what kind of terminal is this?
_CODES = re.compile(r"\033\[[0-9;?>=<]*[a-zA-Z]|\033\][^\a\033]*(?:\a|\033\\)|\033[=>()][B0]?|[\r\a\b]")
# how each shell is started with its prompt and the script; fish wants the prompt as a function
_SHELLS: dict[str, tuple[list[str], str]] = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "PS1='{ready} '; source {script}"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "PS1='{ready} '; autoload -Uz compinit; compinit -u -D; source {script}; compdef _shtab_mobile_gguf "
        "mobile-gguf",
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        "function fish_prompt; echo -n '{ready} '; end; set -g fish_greeting; source {script}",
    ),
}
# What is typed, and the words that the program is run with.
_LINES = [
    ("mobile-gguf plan --pres\tcod\t", "plan --preset coder"),
    ("mobile-gguf run --mode li\t", "run --mode little"),
    ("mobile-gguf show my-mo\t", "show my-model"),
    ("mobile-gguf sessions exp\ttri\t", "sessions export trip"),
    ("mobile-gguf embed --form\tnp\t", "embed --format npy"),
]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A mobile-gguf that tells its words, and gives names as the real one does."""
    models_dir().mkdir(parents=True)
    (models_dir() / "my-model.gguf").write_text("")
    presets_dir().mkdir(parents=True)
    (presets_dir() / "coder.toml").write_text("")
    remember(Conversation("", [{"role": "user", "content": "hi"}]), "trip")
    path = tmp_path / "bin" / "mobile-gguf"
    path.parent.mkdir()
    real = shlex.quote(sys.executable)
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = completion ]; then exec {real} -m mobile_gguf "$@"; fi\n'
        'printf "%s" "<ran"; printf " %s" "$@"; echo ">"\n'
    )
    path.chmod(0o755)
    return path


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, argv: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._data = b""
        self._n_told = 0
        pid, self._master = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.execvpe(argv[0], argv, environment)
        self._pid = pid

    @property
    def heard(self) -> str:
        """All that came, without codes, which may come in parts."""
        return _CODES.sub("", self._data.decode(errors="replace"))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, true: Callable[[str], bool]) -> None:
        """Read until what was heard is as wanted."""
        deadline = time.monotonic() + _SECONDS
        while not true(self.heard):
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"it never came: {self.heard!r}"
            self._data += os.read(self._master, 65536)
            for _ in _ASKED_KIND.findall(self._data)[self._n_told :]:
                self._n_told += 1
                self.type("\033[?62c")

    def close(self) -> None:
        os.close(self._master)
        os.waitpid(self._pid, 0)


@pytest.mark.parametrize("shell", _SHELLS)
def test_a_shell_completes_a_line(shell: str, program: Path, tmp_path: Path) -> None:
    script = tmp_path / f"script.{shell}"
    script.write_text(completion.script(make_parser(), shell))
    argv, begin = _SHELLS[shell]
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "TERM": "xterm", "HOME": str(tmp_path)}
    terminal = Terminal(argv, tmp_path, environment)
    try:
        # as one would from a file: sourced before the first line that is completed
        terminal.type(begin.format(ready=_READY, script=shlex.quote(str(script))) + "\n")
        terminal.until(lambda heard: heard.count(_READY) >= (2 if shell != "fish" else 1) and "\n" in heard)
        for typed, meant in _LINES:
            n_before = terminal.heard.count("<ran")
            for piece in re.split(r"(?<=\t)", typed):
                terminal.type(piece)
            terminal.type("\n")
            terminal.until(
                lambda heard, n=n_before: heard.count("<ran") > n and heard.rstrip().endswith(_READY)
            )
            assert terminal.heard.rpartition("<ran ")[2].split(">")[0].strip() == meant
        terminal.type("exit\n")
    finally:
        terminal.close()


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_is_one_that_the_shell_can_read(shell: str, program: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(completion.script(make_parser(), shell))
    subprocess.run([shell, "-n", str(script)], check=True)


def test_names_are_those_that_are_there(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime_dir().mkdir(parents=True)

    def names(kind: str) -> list[str]:
        assert main(["completion", "--names", kind]) == 0
        return capsys.readouterr().out.split()

    assert names("models") == ["demo", "my-model", "hf:"]
    assert names("presets") == ["coder"]
    assert names("conversations") == ["trip"]
    assert names("sessions") == ["last", "trip"]
    assert names("servers") == []


def test_no_shell_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 2
    assert "a shell is needed: bash, zsh, fish" in capsys.readouterr().err
