"""Servers that several tests ask: over the scripted engine, and as commands over the real one."""

import contextlib
from typing import Any

import pytest
from fake_backend import FakeBackend, scripted
from server_harness import Command, running

from mobile_gguf.engine.binding import find_engine


@pytest.fixture
def hello(fake_model):
    with running(fake_model(FakeBackend(scripted("hello there")))) as server:
        yield server


@pytest.fixture
def serve():
    """Starts servers; whatever becomes of the test, none is left."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any, **environment: str) -> Command:
            served = Command(*arguments, **environment)
            stack.callback(served.process.communicate)
            stack.callback(served.process.kill)
            return served

        yield start


@pytest.fixture(scope="module")
def command(demo_gguf):
    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")
    served = Command(demo_gguf, "--ram-budget", "40%", "--alias", "demo", "-c", "1024", "-n", "40")
    assert served.url, served.process.communicate()[1]
    yield served
    code, error = served.end()
    assert code == 0, error
    assert "Traceback" not in error
