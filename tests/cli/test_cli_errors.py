"""What the command does when something outside of it refuses; each a line and an exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from mobile_gguf.cli import VERBS, main

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-m", "mobile_gguf"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_of_80_columns(capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 79] == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["run", "demo", "--nosuch"], "unrecognized arguments: --nosuch (see `mobile-gguf run --help`)"),
        (
            ["run", "demo", "--ram_budget", "4G", "hi"],
            "unrecognized arguments: --ram_budget; did you mean --ram-budget? (see `mobile-gguf run --help`)",
        ),
        (
            ["engine", "build", "--jbos=3"],
            "unrecognized arguments: --jbos; did you mean --jobs? (see `mobile-gguf engine build --help`)",
        ),
        (["list", "foo"], "unrecognized arguments: foo (see `mobile-gguf list --help`)"),
        (["--nosuch"], "unrecognized arguments: --nosuch (see `mobile-gguf --help`)"),
        (
            ["run", "demo", "-c", "x"],
            "argument -c/--ctx-size: invalid whole number value: 'x' (see `mobile-gguf run --help`)",
        ),
        (
            ["bench", "--tokens", "1.5"],
            "argument --tokens: invalid whole number value: '1.5' (see `mobile-gguf bench --help`)",
        ),
        (
            ["calibrate", "demo", "--tokens", "0"],
            "argument --tokens: 0: it must be at least 1 (see `mobile-gguf calibrate --help`)",
        ),
        (
            ["engine", "build", "--jobs", "-2"],
            "argument --jobs: -2: it must be at least 1 (see `mobile-gguf engine build --help`)",
        ),
        (
            ["verify", "demo", "-t", "100000"],
            "argument -t/--threads: threads is 100000: it must be at most 512"
            " (see `mobile-gguf verify --help`)",
        ),
    ],
)
def test_a_wrong_argument_names_the_help_of_its_verb(capsys, argv, line):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"mobile-gguf: error: {line}\n")


@pytest.mark.parametrize(
    ("argv", "begin"),
    [
        (["run", "demo", "--json", "--nosuch", "hi"], "unrecognized arguments: --nosuch"),
        (["run", "demo", "--mode", "fast", "--json"], "argument --mode: mode is 'fast'"),
        (["frobnicate", "--json"], "there is no verb 'frobnicate'"),
    ],
)
def test_a_wrong_argument_is_an_object_for_who_asks_for_json(capsys, argv, begin):
    with pytest.raises(SystemExit):
        main(argv)
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert (error["type"], error["exit_code"]) == ("UsageError", 2)
    assert error["message"].startswith(begin)
    assert said.err == f"mobile-gguf: error: {error['message']}\n"


def test_json_behind_the_words_is_no_option(capsys):
    with pytest.raises(SystemExit):
        main(["run", "demo", "--nosuch", "--", "--json"])
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_behind_standard_output_is_a_line():
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*PROGRAM, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (
        1,
        "mobile-gguf: error: standard output: No space left on device\n",
    )


def test_a_reader_that_goes_away_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*PROGRAM, "list"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.skipif(importlib.util.find_spec("socksio") is not None, reason="socksio is there")
@pytest.mark.parametrize("variable", ["ALL_PROXY", "https_proxy"])
def test_a_socks_proxy_that_cannot_be_used_is_a_line(variable):
    environment = {**os.environ, variable: "socks5://127.0.0.1:9"}
    ended = subprocess.run(
        [*PROGRAM, "pull", "hf:org/model"], env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines() == [
        "asking the Hub for org/model",
        f"mobile-gguf: error: hf:org/model: {variable} is a SOCKS proxy, which needs the package socksio:"
        " `pip install socksio`, or unset it",
    ]
