"""A model that was loaded before a fork refuses to work in the child, and hangs and frees nothing there."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NoReturn

import gguf_samples
import pytest
import tiny_models

import mobile_gguf
from mobile_gguf import EngineError, Model, aio
from mobile_gguf.api.model import backend_of

_SECONDS = 600
_REFUSED = "this model was loaded before a fork: load it in the child process"


@pytest.fixture(params=["40%", "auto"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with mobile_gguf.load(tiny_models.path("qwen3moe"), ram_budget=request.param) as loaded:
        loaded.chat("ab", max_tokens=2)
        yield loaded


def in_child(work: Callable[[], Any]) -> int:
    """The exit code of a forked child that does ``work``, 1 if it raises."""
    pid = os.fork()
    if pid == 0:
        _work_and_leave(work)
    for _ in range(10 * _SECONDS):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -9


def _work_and_leave(work: Callable[[], Any]) -> NoReturn:
    code = 1
    try:
        work()
        gc.collect()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(EngineError) as error:
        call()
    assert str(error.value) == _REFUSED


def test_every_call_is_refused_and_the_parent_goes_on(model: Model) -> None:
    stream = model.stream("hello", max_tokens=5)
    next(stream)
    watch = model.experts().watch()

    def work() -> None:
        calls: list[Callable[[], Any]] = [
            lambda: model.generate("x"), lambda: model.chat("x"), lambda: next(model.stream("x")),
            lambda: model.tokenize("x"), lambda: model.detokenize([1]), lambda: model.piece(1),
            lambda: model.is_end(1), lambda: model.embed("x", pooling="mean"), model.stats, model.last_logits,
            lambda: model.configure(gamma=0.5), lambda: model.budget_bytes, lambda: next(stream),
            model.devices, lambda: model.can_generate,
        ]  # fmt: skip
        for call in calls:
            refused(call)
        assert model.experts().places() is None
        assert len(watch.take()) == 0
        watch.close()
        stream.close()
        model.close()

    assert in_child(work) == 0
    stream.close()
    watch.close()
    # the process that renders the template is the parent's still
    assert len(model.chat("ab", max_tokens=2).tokens) == 2


def test_locks_that_another_thread_holds_at_the_fork(model: Model) -> None:
    locks = [backend_of(model)._prompts._renderer._lock, model.experts()._lock, model._hold.lock]

    def work() -> None:
        refused(lambda: model.generate("x"))
        assert model.experts().places() is None
        model.close()

    with ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        assert in_child(work) == 0


def test_a_child_may_load_for_itself(model: Model) -> None:
    path, wanted = model.path, model.generate("ab", max_tokens=3, temperature=0).tokens

    def work() -> None:
        with mobile_gguf.load(path, ram_budget="40%") as own:
            assert own.generate("ab", max_tokens=3, temperature=0).tokens == wanted

    assert in_child(work) == 0


def test_a_child_frees_nothing() -> None:
    # the interpreter's own exit: finalizers, atexit, what is left in modules
    code = (
        "import os, sys, mobile_gguf\n"
        "models = [mobile_gguf.load(sys.argv[1], ram_budget=budget) for budget in ('40%', 'auto')]\n"
        "streams = [m.stream('hello', max_tokens=5) for m in models]\n"
        "for stream in streams: next(stream)\n"
        "pid = os.fork()\n"
        "if pid: sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "del models[0], streams[0]\n"
        "sys.exit(7)\n"
    )
    done = gguf_samples.in_child(code, tiny_models.path("qwen3moe"))
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def _use(model: Model) -> None:
    refused(lambda: model.generate("x"))


def test_multiprocessing(model: Model) -> None:
    process = multiprocessing.get_context("fork").Process(target=_use, args=(model,))
    process.start()
    process.join(_SECONDS)
    assert process.exitcode == 0


def test_a_fork_while_another_thread_generates(model: Model) -> None:
    started = threading.Event()
    thread = threading.Thread(
        target=lambda: model.generate("ab", max_tokens=60, on_chunk=lambda _chunk: started.set())
    )
    thread.start()
    assert started.wait(_SECONDS)
    try:
        for _ in range(3):
            assert in_child(lambda: _use(model)) == 0
    finally:
        thread.join()


def test_a_model_to_await() -> None:
    path = tiny_models.path("qwen3moe")
    model = asyncio.run(aio.load(path))

    async def ask() -> None:
        with pytest.raises(EngineError, match="before a fork"):
            await model.generate("x")
        await model.close()

    try:
        assert in_child(lambda: asyncio.run(ask())) == 0
    finally:
        asyncio.run(model.close())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies(duplicate: Callable[[Any], Any], capfd: pytest.CaptureFixture[str]) -> None:
    loaded = asyncio.run(aio.load(tiny_models.path("qwen3moe")))
    try:
        for what in (loaded, loaded.model):
            with pytest.raises(TypeError, match="holds a loaded file and cannot be copied or pickled"):
                duplicate(what)
        gc.collect()
    finally:
        asyncio.run(loaded.close())
    assert capfd.readouterr() == ("", "")
