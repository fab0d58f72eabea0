"""A model that is loaded again goes on with the conversations that it had."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import mobile_gguf
from mobile_gguf import Model
from mobile_gguf.files.paths import sessions_dir

pytestmark = pytest.mark.engine
ATTENTION, HYBRID = "qwen3moe", "nemotron-h"


def text(seed: int, n: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 200) for _ in range(n)]


def load(path: Path | str, **options: Any) -> Model:
    usual: dict[str, Any] = {"n_ctx": 3072, "threads": 1, "threads_batch": 1, "session_cache": "64MiB"}
    return mobile_gguf.load(path, **(usual | options))


def say(model: Model, prompt: list[int], n: int = 4) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were computed."""
    reply = model.generate(prompt, temperature=0, max_tokens=n)
    return list(reply.tokens), int(reply.timings["prompt_n"])


@pytest.mark.parametrize(("name", "most"), [(ATTENTION, 64), (HYBRID, 512)])
def test_a_conversation_goes_on_after_a_restart(name: str, most: int) -> None:
    path = tiny_models.path(name)
    one, other = text(1, 2000), text(2, 300)
    with load(path) as model:
        first, n = say(model, one)
        assert n == 2000
        say(model, other)  # puts the first one out of the context
    turn = [*one, *first, *text(3, 20)]
    with load(path) as model:
        answer, n = say(model, turn)
        assert n <= 20 + 64
        assert say(model, [*other, 7, 8])[1] <= 64, "and so does the one that was in the context"
        edited, n = say(model, [*one[:1800], 9, 9])
        assert n <= 2 + most
    with load(path, session_cache="off") as model:
        afresh, n = say(model, turn)
        assert n == len(turn)
        assert afresh == answer
        assert say(model, [*one[:1800], 9, 9])[0] == edited
    assert all(file.stat().st_mode & 0o77 == 0 for file in sessions_dir().glob("*.session"))


@pytest.mark.parametrize("later", [1, 3])
def test_conversations_that_share_a_context_go_on_after_a_restart(later: int) -> None:
    path = tiny_models.path(ATTENTION)
    texts = [text(seed, 300) for seed in range(3)]
    with load(path, parallel=3, n_ctx=1024) as model:
        for one in texts:
            one += say(model, one)[0]
    with load(path, parallel=later, n_ctx=1024) as model:
        for one in texts:
            assert say(model, [*one, 7, 8])[1] <= 64


def test_python_writes_no_files_that_nobody_asked_for() -> None:
    with load(tiny_models.path(ATTENTION), session_cache="auto") as model:
        assert model.sessions is None
        say(model, text(1, 100))
    assert not sessions_dir().exists()


def test_what_does_not_fit_is_computed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_models.path(ATTENTION), path)
    with load(path) as model:
        say(model, text(1, 200))

    def told(**options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mobile_gguf"), load(path, **options) as model:
            assert say(model, [*text(1, 200), 5, 6])[1] == 202
        return [record.message for record in caplog.records if "saved conversation" in record.message]

    (line,) = told(flash_attn=True)
    assert "flash attention off, now on" in line
    (line,) = told(cache_type_k="q8_0")
    assert "it was made with keys f16, now q8_0" in line
    for file in sessions_dir().glob("*.session"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert "damaged" in told()[-1]


_WRITER = """
import sys
import mobile_gguf
from mobile_gguf.generate.sessions import session_files

def half(file, part):
    file.write(part[: len(part) // 2])
    print("writing", flush=True)
    sys.stdin.read()

session_files._write_all = half
options = {"n_ctx": 3072, "threads": 1, "threads_batch": 1, "session_cache": "64MiB"}
with mobile_gguf.load(sys.argv[1], **options) as model:
    model.generate([int(token) for token in sys.argv[2:]], temperature=0, max_tokens=4)
"""


def test_a_process_that_is_killed_while_it_writes_a_conversation(caplog: pytest.LogCaptureFixture) -> None:
    path, said = tiny_models.path(ATTENTION), text(1, 200)
    command = [sys.executable, "-c", _WRITER, str(path), *map(str, said)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        child.kill()
    assert [file.suffix for file in sessions_dir().iterdir() if file.name != "lock"] == [".partial"]
    for n in (202, 2):
        with caplog.at_level(logging.WARNING, "mobile_gguf"), load(path) as model:
            assert say(model, [*said, 5, 6])[1] == n
    assert [record.message for record in caplog.records if "conversation" in record.message] == []
    assert [file.suffix for file in sessions_dir().iterdir() if file.name != "lock"] == [".session"]


def test_another_file_in_its_place_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_models.path(ATTENTION), path)
    with load(path) as model:
        say(model, text(1, 200))
    shutil.copy(tiny_models.path(HYBRID), path)
    with caplog.at_level(logging.WARNING, "mobile_gguf"), load(path) as model:
        assert say(model, [*text(1, 200), 5, 6])[1] == 202
    assert [record.message for record in caplog.records if "another file then" in record.message]
