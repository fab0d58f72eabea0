"""``--rpc`` and ``engine rpc-server`` over the real engine: layers split, and servers lost at any moment."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engine_libs
import pytest
import tiny_models
from rpc_proxy import Proxy

MODEL = "qwen3moe"
N = 24
SERVE = [sys.executable, "-m", "mobile_gguf", "engine", "rpc-server", "--threads", "1"]


def environment(**more: str) -> dict[str, str]:
    return engine_libs.child_environment(engine_libs.engine_lib()) | more


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and what it says on stdout when it is ready."""
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*SERVE, *arguments], env=environment(), **pipe)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """Two servers."""
    with serving("--port", "0") as (_one, first), serving("--port", "0") as (_two, second):
        yield int(first.rpartition(":")[2]), int(second.rpartition(":")[2])


def answer(rpc: str | None, n: int = N, **variables: str) -> subprocess.CompletedProcess[str]:
    device = ["--vram-budget", "off"] if rpc is None else ["--rpc", rpc]
    line = [
        "run",
        str(tiny_models.path(MODEL)),
        "once upon a time",
        "--raw",
        "-n",
        str(n),
        "--temp",
        "0",
        "-t",
        "1",
    ]
    return subprocess.run(
        [sys.executable, "-m", "mobile_gguf", *line, "-c", "256", *device],
        capture_output=True, text=True, timeout=800, check=False, env=environment(**variables),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(ports: tuple[int, int]) -> tuple[str, int, int]:
    """The host's answer; bytes to the second of two servers for the first token, and for all of them."""
    host = answer(None)
    assert host.returncode == 0, host.stderr
    sent = []
    for n in (1, N):
        with Proxy(ports[0]) as first, Proxy(ports[1]) as second:
            done = answer(f"{first.endpoint},{second.endpoint}", n)
            assert done.returncode == 0, done.stderr
            assert n < N or done.stdout == host.stdout
            assert first.forwarded > 10_000, "no layer went to the first server"
            sent.append(second.forwarded)
    assert sent[1] > sent[0] > 10_000
    return host.stdout, sent[0], sent[1]


def test_layers_on_two_servers_give_the_hosts_tokens(whole):
    assert whole[0].strip()


def assert_lost(done: subprocess.CompletedProcess[str], endpoint: str) -> None:
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert len(lines) == 1
    assert endpoint in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.95, 0.995])
def test_a_server_lost_before_the_first_token(whole, ports, share):
    with Proxy(ports[1], int(whole[1] * share)) as second:
        done = answer(f"127.0.0.1:{ports[0]},{second.endpoint}")
        assert_lost(done, second.endpoint)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("share", [0.25, 0.6, 0.9])
def test_a_server_lost_mid_answer_leaves_the_text_so_far(whole, ports, share):
    text, first_token, everything = whole
    with Proxy(ports[1], int(first_token + (everything - first_token) * share)) as second:
        done = answer(f"127.0.0.1:{ports[0]},{second.endpoint}")
        assert_lost(done, second.endpoint)
        assert "was lost while" in done.stderr
        assert "load the model again" in done.stderr
    so_far = done.stdout.removesuffix("\n")
    assert so_far
    assert text.startswith(so_far)
    assert len(so_far) < len(text.removesuffix("\n"))


def test_a_server_that_freezes_mid_answer(whole, ports):
    text, first_token, everything = whole
    with Proxy(ports[1], (first_token + everything) // 2, freeze=True) as second:
        done = answer(f"127.0.0.1:{ports[0]},{second.endpoint}", MOBILE_GGUF_RPC_TIMEOUT="20")
        assert_lost(done, second.endpoint)
    assert "no answer within 20 s" in done.stderr
    assert done.stdout.removesuffix("\n")
    assert text.startswith(done.stdout.removesuffix("\n"))


_RELOAD = """
import os, signal, sys
from mobile_gguf import load
from mobile_gguf.errors import EngineError
path, endpoint, pid = sys.argv[1], sys.argv[2], int(sys.argv[3])
with load(path, rpc=endpoint, n_ctx=256, threads=1) as model:
    chunks = model.stream("once upon a time", max_tokens=64, temperature=0.0)
    next(chunks)
    os.kill(pid, signal.SIGKILL)
    for attempt in range(2):
        try:
            list(chunks) if attempt == 0 else model.generate("again", max_tokens=4)
        except EngineError as error:
            print(error)
with load(path, vram_budget="off", n_ctx=256, threads=1) as model:
    print(len(model.generate("once", max_tokens=4, temperature=0.0).tokens))
"""


def test_after_a_loss_the_model_says_that_it_must_be_loaded_again():
    with serving("--port", "0") as (process, line):
        endpoint = line.removeprefix("listening on ")
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(tiny_models.path(MODEL)), endpoint, str(process.pid)],
            capture_output=True, text=True, timeout=800, check=False, env=environment(),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, tokens = done.stdout.splitlines()
    assert endpoint in first
    assert second == first
    assert first.endswith("load the model again")
    assert int(tokens) > 0


def test_a_server_says_what_it_offers_and_ends_by_ctrl_c():
    with serving("--port", "0", "--host", "0.0.0.0", "--device", "CPU") as (process, line):
        assert line.startswith("listening on 0.0.0.0:")
        process.send_signal(signal.SIGINT)
        rest, narration = process.communicate(timeout=800)
    assert process.returncode == 0
    assert rest == ""
    assert "GiB free" in narration
    assert "warning: 0.0.0.0 can be reached from other machines" in narration
    assert narration.endswith("stopped\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--port", "PORT"], 4, "address already in use"),
        (["--device", "CUDA7"], 2, "--device CUDA7: there is no such device; this engine has CPU"),
        (["--device", "CPU,CPU"], 2, "--device CPU is named twice"),
        (["--host", "my-box"], 2, "give an IPv4 address"),
        (["--port", "70000"], 2, "'70000' is no port"),
        (["--threads", "0"], 2, "threads is 0: it must be at least 1"),
    ],
)
def test_errors_of_the_server_are_one_line(ports, arguments, code, words):
    arguments = [str(ports[0]) if argument == "PORT" else argument for argument in arguments]
    done = subprocess.run(
        [*SERVE, *arguments], capture_output=True, text=True, timeout=800, check=False, env=environment()
    )
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
