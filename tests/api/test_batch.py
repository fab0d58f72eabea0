"""``run --batch`` over the scripted engine: order, bad lines, going on after every way of being stopped."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, scripted

from mobile_gguf.cli import main
from mobile_gguf.errors import ExpertReadError

LINES = [
    '{"prompt": "one", "id": "a"}',
    '{"prompt": "two"}',
    '{"messages": [{"role": "user", "content": "3"}]}',
]


@pytest.fixture
def batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a batch of the given lines; returns exit code, stdout, stderr."""

    def run(lines: list[str], *argv: str, out: bool = True, model: str = "m.gguf") -> tuple[int, str, str]:
        (tmp_path / "in.jsonl").write_text(
            "\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape"
        )
        where = ["--out", str(tmp_path / "out.jsonl")] if out else []
        try:
            code = main(["run", model, "--batch", str(tmp_path / "in.jsonl"), *where, *argv])
        except SystemExit as end:
            code = int(str(end.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def answers(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_one_line_for_each_in_order(batch, answers, fake_load):
    backend = fake_load(FakeBackend(scripted("yes")))
    code, out, err = batch(LINES)
    assert (code, out) == (0, "")
    found = answers()
    assert [(a["line"], a["id"], a["text"], a["finish_reason"], a["error"]) for a in found] == [
        (1, "a", "yes", "stop", None), (2, None, "yes", "stop", None), (3, None, "yes", "stop", None),
    ]  # fmt: skip
    assert found[0]["usage"]["completion_tokens"] == 4
    assert found[0]["receipt"]["tokens_big"] == 4
    assert "batch: 3 of 3 lines" in err
    assert "3 lines | 12 tokens in" in err
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<user>3\n<assistant>")


def test_what_an_iteration_took_is_said(batch, answers, fake_load):
    backend = fake_load(FakeBackend(scripted("yes")))
    backend.scheduler.iteration_ms = (38.2, 41.4)
    _, _, err = batch(LINES)
    assert "tokens/s | 41 ms an iteration, 38 foreseen" in err


def test_options_of_a_line_come_before_those_of_the_command(batch, answers, fake_load):
    backend = fake_load(FakeBackend(scripted("abcdef")))
    batch(
        ['{"prompt": "x"}', '{"prompt": "x", "max_tokens": 4, "temperature": 0}'], "-n", "2", "--temp", "0.5"
    )
    assert [a["text"] for a in answers()] == ["ab", "abcd"]
    assert backend.sampling["temp"] == 0


def test_system_and_raw(batch, answers, fake_load):
    backend = fake_load(FakeBackend(scripted("x")))
    batch(['{"prompt": "hi"}'], "--system", "S")
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<system>S\n<user>hi\n<assistant>")
    batch(['{"prompt": "hi", "system": "T"}'], "--overwrite")
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"<system>T\n<user>hi\n<assistant>")
    batch(['{"prompt": "hi"}'], "--raw", "--overwrite")
    assert bytes(row[0] for row in backend.rows[1:]).startswith(b"hix")


BAD = [
    ("not json", "the line is no JSON"),
    ("[1]", "the line is no JSON object"),
    ("{}", 'either "prompt" or "messages"'),
    ('{"prompt": "x", "messages": []}', 'either "prompt" or "messages"'),
    ('{"prompt": ""}', '"prompt" must be text'),
    ('{"prompt": 5}', '"prompt" must be text'),
    ('{"messages": [{"role": "user"}]}', "needs role and content"),
    ('{"messages": []}', "there are no messages"),
    ('{"messages": "hi"}', '"messages" must be a list'),
    ('{"prompt": "x", "temprature": 1}', "did you mean temperature?"),
    ('{"prompt": "x", "temperature": "hot"}', "it must be a number"),
    ('{"prompt": "x", "stop": 5}', "stop is 5"),
    ('{"prompt": "x", "grammar": 5}', "grammar is 5"),
    ('{"prompt": "x", "json_schema": 5}', "json_schema is 5"),
    ('{"prompt": "x", "cache_prompt": "no"}', "cache_prompt is 'no'"),
    ('{"prompt": "x", "mode": "fast"}', "mode is 'fast'"),
    ('{"prompt": "' + "x" * 600 + '"}', "the context only 512"),
    ('{"prompt": "\udcff"}', "no UTF-8"),
    ("[" * 100_000, "no JSON"),
]


def test_bad_lines_cost_only_themselves(batch, answers, fake_load):
    fake_load(FakeBackend(scripted("y")))
    lines = [line for bad, _ in BAD for line in (bad, '{"prompt": "ok"}')]
    code, _, err = batch(lines)
    assert code == 1
    found = answers()
    assert [a["line"] for a in found] == list(range(1, len(lines) + 1))
    for answer, (_, said) in zip(found[::2], BAD, strict=True):
        assert said in answer["error"]
        assert answer["text"] is None
    assert all(a["text"] == "y" and a["error"] is None for a in found[1::2])
    assert f"in.jsonl, line 3: {BAD[1][1]}" in err
    assert f"{len(BAD)} failed" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("line", "said"), BAD[:3])
def test_strict_ends_before_the_first_answer(batch, fake_load, tmp_path, line, said):
    fake_load(FakeBackend(scripted("y")))
    code, _, err = batch(['{"prompt": "ok"}', line], "--strict")
    assert code == 2
    assert "in.jsonl, line 2: " in err
    assert said in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_last_line_that_was_cut_is_answered_again(batch, answers, fake_load, tmp_path, cut):
    backend = fake_load(FakeBackend(scripted("yes")))
    batch(LINES)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[:-cut])
    before = backend.n_evaluations
    code, _, err = batch(LINES)
    assert code == 0
    assert "2 of 3 lines are answered" in err
    assert backend.n_evaluations > before
    assert [a["line"] for a in answers()] == [1, 2, 3]
    assert "\n".join(whole.decode().splitlines()[:2]) in (tmp_path / "out.jsonl").read_text()


def test_nothing_to_do_loads_nothing(batch, fake_load, monkeypatch):
    fake_load(FakeBackend(scripted("yes")))
    batch(LINES)
    monkeypatch.setattr("mobile_gguf.cli.batch.load_model", lambda _args: pytest.fail("loaded"))
    code, _, err = batch(LINES)
    assert (code, err) == (0, "all 3 lines are answered: nothing to do\n")


def test_lines_that_were_added_are_answered(batch, answers, fake_load):
    fake_load(FakeBackend(scripted("yes")))
    batch(LINES)
    assert batch([*LINES, "", '{"prompt": "four"}'])[0] == 0
    assert [a["line"] for a in answers()] == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("lines", "argv", "said"),
    [
        ([LINES[1], *LINES[1:]], [], "line 1 answers another line"),
        (LINES, ["--temp", "0"], "line 1 answers another line, model or settings"),
        (LINES[:2], [], "more lines than the input"),
    ],
)
def test_an_output_of_something_else_is_left_alone(batch, fake_load, tmp_path, lines, argv, said):
    fake_load(FakeBackend(scripted("yes")))
    batch(LINES)
    before = (tmp_path / "out.jsonl").read_bytes()
    code, _, err = batch(lines, *argv)
    assert code == 2
    assert said in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert batch(lines, *argv, "--overwrite")[0] == 0


def test_a_file_that_is_no_output_is_left_alone(batch, fake_load, tmp_path):
    fake_load(FakeBackend(scripted("yes")))
    (tmp_path / "out.jsonl").write_text("my notes\nmore of them\n")
    code, _, err = batch(LINES)
    assert code == 2
    assert "line 1 is no answer" in err
    assert (tmp_path / "out.jsonl").read_text() == "my notes\nmore of them\n"


def test_ctrl_c_keeps_whole_answers_and_goes_on(batch, answers, fake_load):
    backend = fake_load(FakeBackend(scripted("yes")))
    backend.errors[6] = KeyboardInterrupt()
    code, _, err = batch(LINES)
    assert code == 130
    assert "stopped after 1 of 3 lines: the same command goes on from here" in err
    assert [a["line"] for a in answers()] == [1]
    fake_load(FakeBackend(scripted("yes")))
    assert batch(LINES)[0] == 0
    assert [a["text"] for a in answers()] == ["yes"] * 3


def test_an_engine_error_ends_the_run_and_keeps_what_is_done(batch, answers, fake_load):
    backend = fake_load(FakeBackend(scripted("yes")))
    backend.errors[6] = ExpertReadError("layer 2: short read")
    code, _, err = batch(LINES)
    assert code == 4
    assert "layer 2: short read" in err
    assert [a["line"] for a in answers()] == [1]


def test_without_out_the_answers_go_to_stdout(batch, fake_load):
    fake_load(FakeBackend(scripted("yes")))
    code, out, _ = batch(LINES, out=False)
    assert code == 0

    assert [json.loads(line)["text"] for line in out.splitlines()] == ["yes"] * 3


def test_standard_input(monkeypatch, fake_load, tmp_path, capsys):
    fake_load(FakeBackend(scripted("yes")))
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf{"prompt": "w\xc3\xb6rld"}\r\n'))
    )
    assert main(["run", "m.gguf", "--batch", "-", "--out", str(tmp_path / "o.jsonl")]) == 0
    assert json.loads((tmp_path / "o.jsonl").read_text())["text"] == "yes"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["words"], "give no other"),
        (["--json"], "without --json"),
        (["--overwrite"], "--overwrite needs --out"),
    ],
)
def test_what_does_not_go_together(batch, fake_load, argv, said):
    fake_load(FakeBackend(scripted("yes")))
    code, _, err = batch(LINES, *argv, out=False)
    assert code == 2
    assert said in err


def test_flags_of_a_batch_without_one(capsys):
    assert main(["run", "m.gguf", "--out", "x", "hi"]) == 2
    assert "need --batch FILE" in capsys.readouterr().err


def test_input_and_output_are_not_one_file(batch, fake_load, tmp_path):
    fake_load(FakeBackend(scripted("yes")))
    code, _, err = batch(LINES, "--out", str(tmp_path / "in.jsonl"), out=False)
    assert code == 2
    assert "are the same file" in err


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_input(batch, lines):
    code, _, err = batch(lines)
    assert code == 2
    assert "has no lines to answer" in err


def test_two_writers(batch, fake_load, tmp_path):
    fake_load(FakeBackend(scripted("yes")))
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True);"
        " sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out.jsonl")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result, _, err = batch(LINES)
        other.communicate()
    assert result == 1
    assert "another process is writing it" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk(batch, fake_load):
    fake_load(FakeBackend(scripted("yes")))
    code, _, err = batch(LINES, "--out", "/dev/full", out=False)
    assert code == 1
    assert "Traceback" not in err
    assert "cannot write the answers: No space left" in err
