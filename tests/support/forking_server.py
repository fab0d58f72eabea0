"""A program that serves a model on a thread and forks while it answers, as web applications do.

``python forking_server.py MODEL SECONDS``: each child must be refused and end, each answer of the parent must
be the one that it gave before the first fork. Prints what was wrong, a line each; exit code 1 if any was.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import httpx
from server_harness import running

import mobile_gguf
from mobile_gguf.api.model import Model
from mobile_gguf.errors import MobileError

CHILD_SECONDS = 600.0  # one that waits for a thread or a lock of the parent's waits for ever
# a prompt that is computed whole each time, since last digits hang on what of it is
BODY = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 8, "temperature": 0, "seed": 1, "cache_prompt": False,
}  # fmt: skip


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except MobileError as error:
        return "fork" in str(error)
    return False


def end_of_child(model: Model) -> str:
    """Fork once; what was wrong about the child, empty if nothing."""
    pid = os.fork()
    if pid == 0:
        calls = (
            lambda: model.generate("x"),
            lambda: model.chat("x"),
            lambda: model.tokenize("x"),
            model.stats,
        )
        wrong = sum(not refused(call) for call in calls)
        model.close()
        os._exit(wrong)
    until = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return f"a child was not refused, or ended with {code}" if code else ""
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"a child hung for {CHILD_SECONDS:g} s"


def attack(path: str, seconds: float) -> list[str]:
    """Fork for so long, beside a client; returns what was wrong."""
    problems: list[str] = []
    over = threading.Event()
    n_answers = 0
    with mobile_gguf.load(path, n_ctx=256, ram_budget="60%") as model, running(model) as server:

        def ask() -> str:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=300)
            return answer.json()["choices"][0]["message"]["content"]

        expected = ask()

        def be_good() -> None:
            nonlocal n_answers
            while not over.is_set():
                try:
                    if (text := ask()) != expected:
                        problems.append(f"the client got {text!r} and not {expected!r}")
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    problems.append(f"the client lost an answer: {error!r}")
                n_answers += 1

        client = threading.Thread(target=be_good)
        client.start()
        until = time.monotonic() + seconds
        while not problems and (time.monotonic() < until or not n_answers):
            if wrong := end_of_child(model):
                problems.append(wrong)
        over.set()
        client.join()
    return problems


if __name__ == "__main__":
    found = attack(sys.argv[1], float(sys.argv[2]))
    print("\n".join(found), flush=True)
    sys.exit(1 if found else 0)
