"""Native code in a process of its own: results, errors and deaths."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from places import SUPPORT

from mobile_gguf.convert.engine_task import EngineDiedError, in_child
from mobile_gguf.convert.verify.result import FAILED, NOT_VERIFIED, PASSED, VerifyResult
from mobile_gguf.errors import BudgetError, EngineError
from mobile_gguf.progress import Progress, no_progress


def double(n: int, progress: Progress) -> int:
    progress("doubling", 0.5)
    return 2 * n


def refuses(_progress: Progress) -> None:
    raise BudgetError("too small")


def aborts(_progress: Progress) -> None:
    """As ggml_abort does: a line on stderr, and SIGABRT."""
    sys.stderr.write("a line before\n/somewhere/else/llama-graph.cpp:2079: fatal error\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGABRT)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds these functions by this module's name."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), str(SUPPORT)]))
    monkeypatch.setitem(sys.modules, "test_engine_task", sys.modules[__name__])
    for function in (double, refuses, aborts):
        monkeypatch.setattr(function, "__module__", "test_engine_task")


def test_a_result_and_its_progress() -> None:
    seen: list[tuple[str, float]] = []
    assert in_child(double, 21, progress=lambda text, done: seen.append((text, done))) == 42
    assert seen == [("doubling", 0.5)]


def test_an_error_keeps_its_type() -> None:
    with pytest.raises(BudgetError, match=r"^too small$"):
        in_child(refuses, progress=no_progress)


def test_a_death_says_the_last_line() -> None:
    with pytest.raises(EngineDiedError) as caught:
        in_child(aborts, progress=no_progress)
    assert str(caught.value) == "the engine died: llama-graph.cpp:2079: fatal error"
    assert caught.value.exit_code == EngineError.exit_code == 4


def test_such_a_verdict_ends_a_command_with_4() -> None:
    assert VerifyResult(FAILED, ("the engine died: x",), engine_died=True).exit_code == 4
    assert [VerifyResult(status).exit_code for status in (PASSED, FAILED, NOT_VERIFIED)] == [0, 1, 1]
