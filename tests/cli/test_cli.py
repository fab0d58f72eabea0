"""The commands over the scripted engine: transcripts, exit codes, JSON."""

import importlib.metadata
import io
import itertools
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, fake_info, scripted

from mobile_gguf import __version__
from mobile_gguf.api import loading
from mobile_gguf.api import model as model_module
from mobile_gguf.cli import VERBS, main, make_parser, parse
from mobile_gguf.errors import ExpertReadError
from mobile_gguf.options import LoadOptions

RATE = re.compile(r"\d+\.\d tok/s")


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command in this process: (exit code, stdout, stderr with the speed as N)."""

    def run(*argv, stdin="", terminal=False):
        stream = io.StringIO(stdin)
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stream)
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, RATE.sub("N tok/s", err)

    return run


# run


def test_run(command, fake_load):
    fake_load(FakeBackend(scripted("Blue light scatters.")))
    assert command("run", "m.gguf", "Why is", "the sky blue?") == (
        0,
        "Blue light scatters.\n",
        "21 big | 75% hits | 59.0 KiB read | 10 ms stalled | N tok/s\n",
    )


def test_run_uses_the_chat_template_unless_raw(command, fake_load):
    backend = fake_load(FakeBackend(scripted("x")))
    command("run", "m.gguf", "hi", "--system", "S")
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<system>S\n<user>hi\n<assistant>")
    command("run", "m.gguf", "hi", "--raw")
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"hix")
    assert command("run", "m.gguf", "hi", "--raw", "--system", "S")[0] == 2


def test_run_continues_plainly_where_there_is_no_template(command, fake_load):
    backend = fake_load(FakeBackend(scripted("x")), chat_template=None)
    command("run", "m.gguf", "hi")
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"hix")


def test_run_takes_words_of_the_prompt_after_options_too(command, fake_load):
    backend = fake_load(FakeBackend(scripted("x")))
    command("run", "m.gguf", "-n", "5", "one", "--temp", "0", "two", "--raw")
    assert bytes(row[0] for row in backend.rows[1:8]) == b"one two"
    assert backend.sampling["temp"] == 0
    command("run", "m.gguf", "--raw", "--", "-n", "x")
    assert bytes(row[0] for row in backend.rows[1:5]) == b"-n x"


@pytest.mark.parametrize("argv", [[], ["-"], ["-f", "FILE"]])
def test_run_takes_the_prompt_from_stdin_or_a_file(command, fake_load, tmp_path, argv):
    backend = fake_load(FakeBackend(scripted("x")))
    (tmp_path / "p.txt").write_text("from a file")
    argv = [str(tmp_path / "p.txt") if word == "FILE" else word for word in argv]
    assert command("run", "m.gguf", "--raw", *argv, stdin="from a pipe")[0] == 0
    given = bytes(row[0] for row in backend.rows[1:12])
    assert given == (b"from a file" if "-f" in argv else b"from a pipe")


def test_run_json_is_one_object(command, fake_load):
    fake_load(FakeBackend(scripted("wörld", sure=[0.9, 0.1])))
    code, out, err = command("run", "m.gguf", "hello", "--json", "--mode", "big-little")
    answer = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert list(answer) == ["text", "finish_reason", "usage", "timings", "receipt", "plan"]
    assert (answer["text"], answer["finish_reason"]) == ("wörld", "stop")
    assert answer["usage"]["completion_tokens"] == 7
    receipt = answer["receipt"]
    assert receipt["tokens_big"] + receipt["tokens_little"] + receipt["tokens_fallback"] == 7
    assert (receipt["mode"], receipt["tokens_fallback"]) == ("big-little", 1)


def test_run_without_a_prompt_on_a_terminal_is_a_chat(command, fake_load, monkeypatch):
    fake_load(FakeBackend(scripted("hello")))
    lines = iter(["hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, err = command("run", "m.gguf", terminal=True)
    assert (code, out) == (0, "hello\n")
    assert err.startswith("Fake MoE (exact); /help")


def test_run_interrupted_keeps_the_text_and_ends_with_130(command, fake_load):
    backend = fake_load(FakeBackend(scripted("abcdef")))
    backend.errors[3] = KeyboardInterrupt()
    code, out, err = command("run", "m.gguf", "x")
    assert (code, out) == (130, "abc\n")
    assert err.endswith("| interrupted\n")
    backend.errors[backend.n_evaluations + 2] = KeyboardInterrupt()
    code, out, err = command("run", "m.gguf", "x", "--json")
    assert (code, json.loads(out)["finish_reason"]) == (130, "interrupted")


def test_an_interrupt_between_two_chunks_ends_with_130_too(command, fake_load, monkeypatch):
    fake_load(FakeBackend(scripted("abcdef")))

    class Terminal(io.StringIO):
        def write(self, text):
            if text == "c":
                raise KeyboardInterrupt
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    code, _, err = command("run", "m.gguf", "x")
    assert (code, terminal.getvalue()) == (130, "ab\n")
    assert "3 big" in err


def test_an_interrupt_while_loading(command, monkeypatch, fake_load):
    fake_load()
    monkeypatch.setattr(loading, "open_backend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert command("run", "m.gguf", "x") == (130, "", "")


# errors


def error_of(result):
    code, _, err = result
    assert err.startswith("mobile-gguf: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return code, err.removeprefix("mobile-gguf: error: ").strip()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["run", "/no/such.gguf", "x"], 3, "no such model: /no/such.gguf"),
        (["show", "nothing"], 3, "no such model: nothing"),
        (["run", "org/repo", "x"], 3, "if it is on the Hub, write hf:org/repo"),
        (["run", "hf:repo", "x"], 2, "the organisation is missing, write hf:ORG/repo"),
        (["run", "FILE", "x"], 1, "is not a GGUF file"),
        (["run", "m.gguf", "--temp", "-1", "x"], 2, "temperature is -1.0: it must be at least 0"),
        (["run", "m.gguf", "--frobnicate", "x"], 2, "unrecognized arguments: --frobnicate"),
        (["run"], 2, "required: MODEL"),
        (["chat", "m.gguf", "words"], 2, "unrecognized arguments: words"),
        (["frobnicate"], 2, "there is no verb 'frobnicate'"),
        (["run", "m.gguf", "-f", "/no/prompt", "x"], 2, "not both"),
        (["run", "m.gguf", "-f", "/no/prompt"], 2, "cannot read /no/prompt"),
        (["run", "m.gguf", " "], 2, "the prompt is empty"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(command, tmp_path, argv, code, words):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    argv = [str(tmp_path / "bad.gguf") if word == "FILE" else word for word in argv]
    got, text = error_of(command(*argv))
    assert got == code
    assert words in text


def test_no_engine_is_exit_code_4(command, fake_load):
    fake_load(FakeBackend(has_engine=False, has_store=False))
    code, text = error_of(command("run", "m.gguf", "x", "--mode", "little"))
    assert code == 4
    assert text.endswith("run `mobile-gguf engine build`")


def test_a_read_that_fails_keeps_the_text_so_far(command, fake_load):
    backend = fake_load(FakeBackend(scripted("abc")))
    backend.errors[2] = ExpertReadError("m.gguf: layer 3, expert 7:\nshort read")
    code, out, err = command("run", "m.gguf", "x")
    assert (code, out, err) == (4, "ab\n", "mobile-gguf: error: m.gguf: layer 3, expert 7: short read\n")


def test_notices_are_narrated(command, fake_load):
    fake_load(FakeBackend(scripted("x")), n_expert_used=1)
    _, out, err = command("run", "m.gguf", "x", "--mode", "little")
    assert out == "x\n"
    assert err.splitlines()[0] == (
        "mobile-gguf: note: m.gguf routes every token to one expert: mode little has no effect"
    ).replace("m.gguf", "fake.gguf")


def test_no_verb_shows_the_help(command):
    code, out, err = command()
    assert (code, out) == (2, "")
    assert all(verb in err for verb in VERBS)


def test_version(command):
    assert command("--version")[:2] == (0, f"mobile-gguf {__version__}\n")
    assert importlib.metadata.version("mobile-gguf") == __version__


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(command, verb):
    code, out, _ = command(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: mobile-gguf {verb}")


# chat


def test_chat_reads_lines_until_they_end(command, fake_load):
    fake_load(FakeBackend(scripted("hello")))
    code, out, err = command("chat", "m.gguf", stdin="hi\n\nagain\n")
    assert (code, out) == (0, "hello\nhello\n")
    assert len(err.splitlines()) == 2


def test_chat_commands(command, fake_load):
    backend = fake_load(FakeBackend(scripted("ok")))
    lines = [
        "/set temp 0.25",
        "/set stop",
        "/set mode little",
        "/system Be brief.",
        "hi",
        "/clear",
        "/new",
        "/nonsense",
        "/help",
    ]
    code, out, err = command(
        "chat", "m.gguf", "--no-cache-prompt", stdin="\n".join([*lines, "/exit", "never"])
    )
    told = err.splitlines()
    assert (code, out) == (0, "ok\n")
    assert told[:4] == ["temperature = 0.25", "stop = None", "mode = little", "system message: Be brief."]
    assert told[4].startswith("1 big · 2 little | 75% hits")
    assert told[5:7] == ["conversation cleared"] * 2
    assert told[7] == "unknown command /nonsense; /help lists the commands"
    assert told[8].startswith("/help")
    assert backend.sampling["temp"] == 0.25
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<system>Be brief.\n<user>hi")


def test_chat_set_shows_everything_and_stats_are_lines(command, fake_load):
    fake_load(FakeBackend(scripted("ok")))
    _, _, err = command(
        "chat", "m.gguf", "--temp", "0.5", "--seed", "3", "--gamma", "0.9", stdin="/set\n/stats\n"
    )
    assert {"temperature = 0.5", "seed = 3", "gamma = 0.9", "mode = exact", "top_k = 40"} <= set(
        err.splitlines()
    )
    assert ["n", "expert", "16"] in [line.split() for line in err.splitlines()]


def test_chat_goes_on_after_errors(command, fake_load):
    backend = fake_load(FakeBackend(scripted("ok")))
    backend.errors[0] = ExpertReadError("short read")
    lines = "hi\n/set mode fast\n/set heat 1\n/set temp x\nhi\n"
    code, out, err = command("chat", "m.gguf", stdin=lines)
    errors = [line for line in err.splitlines() if line.startswith("mobile-gguf: error: ")]
    assert (code, out, len(errors)) == (0, "ok\n", 4)


def test_chat_ctrl_c_ends_the_answer_not_the_chat(command, fake_load):
    backend = fake_load(FakeBackend(scripted("abcdef")))
    backend.errors[2] = KeyboardInterrupt()
    code, out, err = command("chat", "m.gguf", stdin="one\ntwo\n")
    assert (code, out) == (0, "ab\nabcdef\n")
    assert err.splitlines()[0].endswith("| interrupted")


def test_chat_ctrl_c_at_the_prompt_only_hints(command, fake_load, monkeypatch):
    fake_load()
    lines = iter([KeyboardInterrupt(), EOFError()])

    def read(_prompt=""):
        raise next(lines)

    monkeypatch.setattr("builtins.input", read)
    code, _, err = command("chat", "m.gguf", terminal=True)
    assert code == 0
    assert "Ctrl-D or /exit to leave" in err


def test_chat_on_a_terminal_keeps_a_history_line_by_line(command, fake_load, monkeypatch, own_directories):
    """Whatever ends it, and beside another chat that writes to the same file."""
    readline = pytest.importorskip("readline")
    fake_load()
    file = own_directories / "data" / "mobile-gguf" / "chat_history"
    found, lines = [], iter(["/help", "/stats"])

    def read(_prompt=""):
        if file.exists():
            found.append(file.read_text())
            file.write_text(file.read_text() + "of another\n")
        line = next(lines, None)
        if line is None:
            raise EOFError
        readline.add_history(line)
        return line

    monkeypatch.setattr("builtins.input", read)
    command("chat", "m.gguf", terminal=True)
    assert found == ["/help\n", "/help\nof another\n/stats\n"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_tab_completes_commands_options_and_files(tmp_path, monkeypatch):
    from mobile_gguf.cli.chat import _completer

    for name in ("notes.txt", "next.md", ".hidden", "two words.md"):
        (tmp_path / name).write_text("")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "main.c").write_text("")
    monkeypatch.chdir(tmp_path)
    complete = _completer(["/help", "/set", "temperature"])

    def found(typed):
        return [*iter(partial(lambda state: complete(typed, next(state)), itertools.count()), None)]

    assert found("/h") == ["/help"]
    assert found("te") == ["temperature"]
    assert found("@") == ["@next.md", "@notes.txt", "@source/"]
    assert found("@source/m") == ["@source/main.c"]
    assert found("@.h") == ["@.hidden"]
    assert found("@nothing/") == []


# show and list


def test_show(command, monkeypatch, tmp_path):
    info = fake_info(path=tmp_path / "fake.gguf")
    monkeypatch.setattr("mobile_gguf.cli.show.verb.resolve_model", lambda _name, _progress: info.path)
    monkeypatch.setattr("mobile_gguf.cli.show.verb.read_gguf_info", lambda _path: info)
    code, out, err = command("show", "fake")
    assert (code, err) == (0, "")
    assert "experts                 16 in each of 4 layers\n" in out
    assert "top-k                   8 (little: 4)\n" in out
    facts = json.loads(command("show", "fake", "--json")[1])
    assert (facts["n_expert"], facts["n_expert_used"], facts["little_k"]) == (16, 8, 4)
    assert facts["expert_bytes"] + facts["dense_bytes"] == info.tensor_bytes
    assert facts["budget_min_bytes"] == info.budget_min_bytes


def test_show_of_a_dense_model_says_so(command, monkeypatch):
    info = fake_info(n_expert=0, n_expert_used=0, expert_layers=())
    monkeypatch.setattr("mobile_gguf.cli.show.verb.resolve_model", lambda _name, _progress: info.path)
    monkeypatch.setattr("mobile_gguf.cli.show.verb.read_gguf_info", lambda _path: info)
    assert "none: a dense model" in command("show", "fake")[1]
    assert json.loads(command("show", "fake", "--json")[1])["expert_bytes"] == 0


def test_list(command, own_directories):
    code, out, _ = command("list")
    assert code == 0
    assert out.splitlines()[1:] == ["demo     -  not built yet: `mobile-gguf run demo` does it"]
    models = own_directories / "data" / "mobile-gguf" / "models"
    models.mkdir(parents=True)
    (models / "big-00001-of-00002.gguf").write_bytes(b"x" * 2048)
    (models / "big-00002-of-00002.gguf").write_bytes(b"x")
    (models / "small.gguf").write_bytes(b"x")
    _, out, _ = command("list")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["demo", "big-00001-of-00002", "small"]
    assert out.count("broken: is not a GGUF file") == 2
    listed = json.loads(command("list", "--json")[1])
    assert [(m["name"], m["bytes"]) for m in listed["models"]] == [
        ("demo", None),
        ("big-00001-of-00002", 2049),
        ("small", 1),
    ]


# the real command


@pytest.fixture
def real(tmp_path):
    """Runs the installed package's command in a process of its own."""

    def run(*argv, **more):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "mobile_gguf", *argv]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        return subprocess.run(command, text=True, env=environment, cwd=tmp_path, **streams)

    return run


def test_the_real_command_reports_errors_without_a_traceback(real, tmp_path):
    done = real("run", str(tmp_path / "none.gguf"), "x")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("mobile-gguf: error: no such model: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_traceback(real):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = real("list", stdout=closed)
    assert (done.returncode, done.stderr) == (1, "")


def test_load_progress_is_shown_once_a_phase_without_a_terminal(command, fake_load, monkeypatch):
    fake_load(FakeBackend(scripted("x")))

    def resolve(name, progress):
        for done in (0.0, 0.5, 1.0):
            progress("building the demo model", done)
        return Path(name)

    monkeypatch.setattr(model_module, "resolve_model", resolve)
    _, _, err = command("run", "demo", "x")
    assert err.splitlines()[0] == "building the demo model"
    assert err.count("building") == 1


@pytest.mark.parametrize(
    ("words", "flash_attn", "prompt"),
    [
        (["-fa", "hello"], True, ["hello"]),
        (["--flash-attn", "off", "hello"], False, ["hello"]),
        (["hello", "-fa"], True, ["hello"]),
        (["-fa", "auto", "on"], "auto", ["on"]),
        (["-fa", "--", "off"], True, ["off"]),
    ],
)
def test_a_flag_that_may_stand_alone_takes_no_prompt_for_its_value(words, flash_attn, prompt):
    args = parse(make_parser(), ["run", "m.gguf", *words])
    assert (args.flash_attn, args.prompt) == (flash_attn, prompt)


def test_a_context_may_be_left_to_the_machine():
    assert parse(make_parser(), ["run", "m.gguf", "-c", "auto", "hi"]).n_ctx is None
    words: dict[str, Any] = {"n_ctx": "auto"}
    assert LoadOptions(**words).n_ctx is None
