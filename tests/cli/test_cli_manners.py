"""What a person meets first: text that is none, names that are not quite right, help, quiet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_backend import FakeBackend, scripted

import mobile_gguf
from mobile_gguf.cli import VERBS, main
from mobile_gguf.errors import EngineError, missing_package
from mobile_gguf.files.paths import models_dir
from mobile_gguf.hub.resolve import local_models, model_name, resolve_model
from mobile_gguf.memory.threads import bounded_threads
from mobile_gguf.wording import shell_command

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-m", "mobile_gguf"]


def lines_of(*argv: bytes | str, **more) -> tuple[int, list[bytes]]:
    """Exit code and the lines of stderr of a real command."""
    ended = subprocess.run([*PROGRAM, *argv], capture_output=True, timeout=600, **more)
    return ended.returncode, ended.stderr.splitlines()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ([b"caf\xe9"], b"the prompt is not UTF-8 text"),
        (["-"], b"standard input is not UTF-8 text"),
        (["-sys", b"caf\xe9", "hi"], b"the system message is not UTF-8 text"),
        (["--grammar", b'root ::= "\xe9"', "hi"], b"grammar is not UTF-8 text"),
        (["-f", "latin.txt"], b"cannot read latin.txt: it is not UTF-8 text (byte 3)"),
        (["-f", "none.txt"], b"cannot read none.txt: No such file or directory"),
    ],
)
def test_text_that_is_not_utf8_is_a_line(tmp_path, argv, what, locale):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, lines = lines_of("run", "demo", *argv, input=b"caf\xe9", cwd=tmp_path, env=environment)
    assert code == 2
    assert len(lines) == 1
    assert what in lines[0]


def test_a_line_of_a_chat_that_is_not_utf8_costs_only_itself(fake_load, monkeypatch, capsys):
    fake_load(FakeBackend(scripted("ok")))
    lines = iter(["caf\udce9", "hi"])

    def read(_prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "m.gguf", "--plain"]) == 0
    out, err = capsys.readouterr()
    assert out == "ok\n"
    assert "that line is not UTF-8 text" in err


@pytest.mark.parametrize(("context_full", "trims"), [("stop", True), ("trim", False)])
def test_a_question_without_room_names_the_ways_out_of_the_chat(
    fake_load, monkeypatch, capsys, context_full, trims
):
    fake_load(FakeBackend(scripted("ok"), n_ctx=60))
    lines = iter(["long " * 50])

    def read(_prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "m.gguf", "--plain", "-c", "60", "--context-full", context_full]) == 0
    err = capsys.readouterr().err
    assert "-c makes it larger, /clear begins again" in err
    assert ("/set context_full trim leaves out the oldest turns" in err) == trims


def test_a_command_to_copy_keeps_the_bytes_of_a_name(tmp_path):
    name = os.fsdecode(b"mod\xe9l '\n.gguf")
    (tmp_path / name).write_text("")
    printed = subprocess.run(
        ["bash", "-c", f"ls {shell_command([name])}"], cwd=tmp_path, capture_output=True, check=True
    )
    assert printed.stdout
    assert shell_command(["a b"]) == "'a b'"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Demo", "did you mean demo?"),
        ("qwn", "did you mean qwen?"),
        ("qwen3:30b", "names of ollama's registry are not known here"),
        ("ollama:llama3", "names of ollama's registry are not known here"),
        ("org/model", "write hf:org/model"),
        ("something", "`mobile-gguf list` shows what is here"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_to_look(capsys, name, hint):
    models_dir().mkdir(parents=True)
    (models_dir() / "qwen.gguf").write_text("")
    assert main(["show", name]) == 3
    err = capsys.readouterr().err
    assert hint in err
    assert err.count("\n") == 1


def test_models_in_folders_have_names():
    nested = models_dir() / "publisher" / "model" / "file-Q4.gguf"
    nested.parent.mkdir(parents=True)
    for path in (nested, models_dir() / "top.gguf", nested.with_name("mmproj-x.gguf")):
        path.write_text("")
    assert [model_name(path) for path in local_models()] == ["top", "publisher/model/file-Q4"]
    assert resolve_model("publisher/model/file-Q4") == nested
    with pytest.raises(mobile_gguf.ModelNotFoundError):
        resolve_model("../models/top")


def test_a_folder_says_which_model_is_taken(tmp_path, fake_load, monkeypatch):
    fake_load()
    monkeypatch.setattr("mobile_gguf.api.model.resolve_model", lambda *_: tmp_path / "only.gguf")
    with mobile_gguf.load(tmp_path) as model:
        assert model.notices == [f"{tmp_path} is a folder: only.gguf, the only model in it, is used"]


def test_more_threads_than_processors_are_bounded_with_a_word():
    assert bounded_threads(None, 2) == (None, "")
    assert bounded_threads(2, 2) == (2, "")
    threads, said = bounded_threads(999, 2)
    assert (threads, "2 are used" in said) == (2, True)


def test_quiet_leaves_the_answer_and_the_errors(command, fake_load):
    fake_load(FakeBackend(scripted("ok")))
    assert command("run", "m.gguf", "hi", "-q") == (0, "ok\n", "")
    code, out, err = command("run", "m.gguf", "-q", "-f", "/no/file", "--json")
    assert (code, err.count("\n")) == (2, 1)
    assert json.loads(out)["error"]["exit_code"] == 2


def test_every_verb_has_a_short_usage_and_an_example_and_can_be_quiet(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        usage, _, rest = capsys.readouterr().out.partition("\n\n")
        assert usage.startswith(f"usage: mobile-gguf {verb}")
        assert usage.count("\n") <= 1
        assert "-q, --quiet" in rest or "--quant" in rest
        assert verb in ("pull", "verify") or "examples:" in rest


def test_help_is_a_verb_and_v_the_version(command):
    assert command("help", "plan")[1] == command("plan", "--help")[1]
    assert command("-V")[1] == f"mobile-gguf {mobile_gguf.__version__}\n"
    assert "did you mean serve?" in command("serv")[2]


def test_output_has_the_same_names_everywhere():
    for verb in ("run", "convert", "calibrate", "bench"):
        text = subprocess.run([*PROGRAM, verb, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(flag in text for flag in ("-o ", "--out", "--output")), verb
    code, _ = lines_of("convert", "x.gguf", "-f")
    assert code == 2  # a prompt's file in run, and nothing else anywhere


def test_a_package_that_is_missing_says_what_to_do(monkeypatch, capsys):
    assert missing_package(ModuleNotFoundError("no", name="mobile_gguf.nothing")) is None
    assert missing_package(ModuleNotFoundError("no", name="asyncio.nothing")) is None
    assert missing_package(ImportError("no name in it", name="numpy")) is None
    missing = ModuleNotFoundError("No module named 'gguf'", name="gguf.constants")

    def load(*_args, **_more):
        raise missing

    monkeypatch.setattr("mobile_gguf.api.model.read_gguf_info", load)
    monkeypatch.setattr("mobile_gguf.api.model.resolve_model", lambda *_: Path("m.gguf"))
    with pytest.raises(EngineError, match=r"gguf is not installed: run `pip install -e \.`"):
        mobile_gguf.load("m.gguf")
    monkeypatch.setattr("mobile_gguf.cli.show.verb.read_gguf_info", load)
    monkeypatch.setattr("mobile_gguf.cli.show.verb.resolve_model", lambda *_: Path("m.gguf"))
    assert main(["show", "m.gguf"]) == 4
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_while_the_command_is_imported_is_no_traceback(tmp_path):
    """A module of the command line presses it, as a person does in the first tenth of a second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == os.environ['AT']: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
    )
    for module in ("mobile_gguf.cli", "mobile_gguf.cli.run", "mobile_gguf.api.model"):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "AT": module}
        code, lines = lines_of("run", "none.gguf", "hi", env=environment)
        assert (code, lines) == (130, []), module
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_another_ctrl_c_at_the_end_is_no_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    )
    code, lines = lines_of("run", "none.gguf", "hi", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (code, len(lines)) == (3, 1), lines


def test_a_standard_stream_that_is_closed_leads_nowhere(tmp_path):
    """Not into the next file that is opened, which would get its number; and no traceback comes of it."""
    code = (
        "import os, sys; from mobile_gguf.__main__ import fill_closed_streams; fill_closed_streams()\n"
        "sys.stdout.write('lost'); print('lost', file=sys.stderr); os.write(1, b'lost')\n"
        "with open('found', 'w') as f:\n"
        "    f.write(repr([f.fileno() > 2, sys.stdin.read(), *(os.readlink(f'/proc/self/fd/{n}') "
        "for n in (0, 1, 2))]))"
    )
    shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", shell, sys.executable, code], cwd=tmp_path, check=True, timeout=600)
    assert (tmp_path / "found").read_text() == repr([True, "", *[os.devnull] * 3])
    closed = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&-', "bash", *PROGRAM, "chat", "none.gguf"], timeout=600
    )
    assert closed.returncode == 3


def test_the_package_gives_what_it_names():
    assert [name for name in mobile_gguf.__all__ if not hasattr(mobile_gguf, name)] == []
    assert mobile_gguf.aio.AsyncModel
    assert issubclass(mobile_gguf.QueueFullError, mobile_gguf.MobileError)
