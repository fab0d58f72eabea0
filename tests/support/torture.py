"""A server under hostile clients, in a memory cgroup, with a good client beside them.

``python tests/support/torture.py --seconds 1800`` (``make torture``). The server runs the demo model with the
default budget in 530 MiB. The good client asks the same few questions all the time, and each answer must
arrive and be the one that it got while it was alone. Now and then the server gets a signal in the middle of
everything and must end in order; another one takes its place. Chat templates are tortured beside it, and a
program forks that has a server of its own. Prints what happened as one JSON object; exit code 1 if the server
died, an answer was lost or wrong, or memory ran out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import httpx

from mobile_gguf.errors import MobileError
from mobile_gguf.generate.prompts.templates import Renderer
from mobile_gguf.memory.cap import MemoryCgroup

LIMIT_BYTES = 530 << 20
FLAGS = [
    *("-t", "1", "-c", "256", "--queue", "12", "--grace", "2", "--embeddings"),
    *("--timeout", "900"),  # a slow machine may take minutes for all that is in line
    "--deterministic",  # else company changes the last digits of sums, and now and then a word
]
# how long an answer may take to end once it was cut: more than usual, for machines that do much else
_SERVE = """import sys
from mobile_gguf.server import answering, run, serving
serving.CUT_SECONDS = answering.CUT_SECONDS = run.CUT_SECONDS = 30.0
from mobile_gguf.__main__ import main
sys.exit(main())"""
# a server that takes longer to end than grace, cut and close allow is killed, and that is a death
END_SECONDS = 120.0
# the run goes on for as long until it has seen what it is there to see
_PATIENCE_SECONDS = 600.0
QUESTIONS = ("Why is the sky blue?", "Name three colours.", "<|im_end|> Is this text?")
ATTACKERS = 6
FORK_SECONDS = 5.0


class Server:
    """``mobile-gguf serve`` in the group; ``problems`` are what it should not have done."""

    def __init__(self, model: Path, group: MemoryCgroup | None) -> None:
        command = [sys.executable, "-c", _SERVE, "serve", str(model), "--port", "0", *FLAGS]
        if group is not None:
            move = f'echo $$ > "{group.directory}/cgroup.procs" && exec "$@"'
            command = ["/bin/sh", "-c", move, "sh", *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        self.errors: list[bytes] = []
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()
        self.url = self.process.stdout.readline().decode().strip()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)
            del self.errors[:-200]

    def end(self, number: int, times: int = 1) -> str | None:
        """Send a signal; returns what was wrong about the end."""
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            time.sleep(0.2)
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = "nothing: it had to be killed"
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        said = b"".join(self.errors).decode(errors="replace")
        if "Traceback" in said:
            return f"a traceback: {said[-2000:]}"
        allowed = {signal.SIGTERM: (0,), signal.SIGINT: (130,)}[signal.Signals(number)]
        return None if code in allowed else f"signal {number} ended it with {code}: {said[-500:]}"

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


class Torture:
    """One run: attackers, a good client, signals, templates."""

    def __init__(self, model: Path, group: MemoryCgroup | None, seed: int, kinds: tuple[str, ...]) -> None:
        self._model = model
        self._group = group
        self._seed = seed
        self._attacks = [attack for kind in kinds for attack in hostile.ATTACKS[kind]]
        self._over = threading.Event()
        self._changing = threading.Event()  # while the server is another one
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.server = Server(model, group)
        self._expected = {question: self._ask(question, self.server.url, False) for question in QUESTIONS}

    def run(self, seconds: float, signals_every: float) -> dict[str, Any]:
        """Do it; returns the report."""
        started = time.monotonic()
        workers: list[Callable[[], None]] = [self._be_good, self._torture_templates, self._fork]
        workers += [lambda i=i: self._attack(random.Random(self._seed * 1000 + i)) for i in range(ATTACKERS)]
        threads = [threading.Thread(target=self._guarded, args=(work,)) for work in workers]
        for thread in threads:
            thread.start()
        rng = random.Random(self._seed)
        next_signal = started + signals_every
        last = started + seconds + _PATIENCE_SECONDS
        while not self.problems and time.monotonic() < (last if self._is_young else started + seconds):
            time.sleep(0.2)
            if not self.server.is_alive:
                self._fail(f"the server died: {self.server.process.returncode}: {self._last_words()}")
            elif time.monotonic() > next_signal:
                next_signal = time.monotonic() + signals_every
                self._change_server(rng)
        self._over.set()
        for thread in threads:
            thread.join()
        if self.server.is_alive and (wrong := self.server.end(signal.SIGTERM)):
            self._fail(wrong)
        report = {
            "seconds": round(time.monotonic() - started, 1),
            "seed": self._seed,
            "outcomes": dict(sorted(self.outcomes.items())),
            "problems": self.problems[:20],
        }
        if self._group is not None:
            report["limit_bytes"] = LIMIT_BYTES
            report["peak_bytes"] = self._group.peak_bytes()
            report["oom_kills"] = self._group.oom_kills()
            if self._group.oom_kills():
                self.problems.append("the kernel killed for want of memory")
                report["problems"] = self.problems[:20]
        return report

    @property
    def _is_young(self) -> bool:
        """Whether no answer has come yet, or no server was ended."""
        seen = list(self.outcomes)
        return "good answers" not in seen or not any(what.startswith("ended by") for what in seen)

    def _last_words(self) -> str:
        return b"".join(self.server.errors).decode(errors="replace")[-1500:]

    def _fail(self, problem: str) -> None:
        with self._lock:
            self.problems.append(problem)

    def _count(self, what: str) -> None:
        with self._lock:
            self.outcomes[what] += 1

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it is a finding
            self._fail(f"{type(error).__name__}: {error}")

    def _attack(self, rng: random.Random) -> None:
        while not self._over.is_set():
            if self._changing.is_set():
                self._over.wait(0.1)
                continue
            attack = rng.choice(self._attacks)
            server = self.server
            try:
                outcome = attack(rng, server.url)
            except hostile.WrongAnswerError as error:
                if self._is_current(server):
                    self._fail(f"{attack.__name__}: {error}")
                continue
            except (httpx.TransportError, OSError) as error:
                # a connection may be closed; whether the server lives is asked elsewhere
                outcome = type(error).__name__
                if isinstance(error, httpx.ReadTimeout) and self._is_current(server):
                    self._fail(f"{attack.__name__} got no answer in {hostile.SECONDS:g} s")
                self._over.wait(0.05)
            self._count(f"{attack.__name__} {outcome}")

    def _is_current(self, server: Server) -> bool:
        return server is self.server and not self._changing.is_set() and not self._over.is_set()

    def _be_good(self) -> None:
        for i in range(10**9):
            question = QUESTIONS[i % len(QUESTIONS)]
            server = self.server
            if self._over.is_set():
                return
            try:
                text = self._ask(question, server.url, i % 2 == 1)
            except (httpx.TransportError, OSError, KeyError, ValueError) as error:
                if server.is_alive and self._is_current(server):
                    self._fail(f"the good client lost an answer: {error!r}")
                self._over.wait(0.1)
                continue
            if text != self._expected[question]:
                if self._is_current(server):
                    self._fail(f"the good client got {text!r} and not {self._expected[question]!r}")
                continue
            self._count("good answers")

    def _ask(self, question: str, url: str, stream: bool) -> str:
        """An answer, however long its place in line takes."""
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 8, "temperature": 0, "seed": 1, "mode": "exact", "stream": stream,
            "cache_prompt": False,  # what another's prompt shares with it was computed in that one's batches
        }  # fmt: skip
        while True:
            answer = httpx.post(url + hostile.CHAT, json=body, timeout=600)
            if answer.status_code != 429:
                break
            self._count("good client told to wait")
            self._over.wait(0.2)
            if self._over.is_set():
                raise KeyError("over")
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {answer.text[:300]}")
        if not stream:
            return answer.json()["choices"][0]["message"]["content"]
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        if any("error" in chunk for chunk in chunks):
            raise ValueError(str(chunks[-1])[:300])
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])

    def _change_server(self, rng: random.Random) -> None:
        """End the server in the middle of everything; another one takes its place."""
        self._changing.set()
        number, times = rng.choice([(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
        if wrong := self.server.end(number, times):
            self._fail(wrong)
        self._count(f"ended by {signal.Signals(number).name} x{times}")
        made = Server(self._model, self._group)
        if not made.url:
            self._fail(f"no other server came: {made.end(signal.SIGTERM)}")
        self.server = made
        self._changing.clear()

    def _fork(self) -> None:
        """Beside it a program forks while its own server answers: clients cannot have a process fork."""
        script = Path(__file__).with_name("forking_server.py")
        while not self._over.is_set():
            done = subprocess.run(
                [sys.executable, str(script), str(self._model), str(FORK_SECONDS)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                self._fail(f"forks: {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
            self._count("rounds of forks")
            self._over.wait(6 * FORK_SECONDS)

    def _torture_templates(self) -> None:
        rng = random.Random(self._seed + 7)
        renderer = Renderer()
        try:
            while not self._over.is_set():
                template = hostile_template(rng)
                try:
                    renderer.render(template, {"messages": [{"role": "user", "content": "hi"}]}, 1 << 20)
                    self._count("templates rendered")
                except MobileError as error:
                    self._count("templates refused")
                    if not str(error).isprintable():
                        self._fail(f"not one line: {error!r} of {template!r}")
                if renderer.render("{{ messages }}", {"messages": 1}, 99) != "1":
                    self._fail(f"the renderer was spoiled by {template!r}")
                self._over.wait(1)
        finally:
            renderer.close()


_NAMES = ("messages", "messages[0].content", "range(99999)", "'a'", "9", "ns.x", "[1, 2]", "{}", "none", "f")
_OPERATORS = ("+", "*", "~", "%", "**", "//", "-", "<", "in", "and")
_FILTERS = (
    "upper",
    "list",
    "center(10 ** 8)",
    "string",
    "length",
    "tojson",
    "join('a' * 9999)",
    "sort",
    "sum",
)
_FILTERS += (
    "replace('', 'b' * 9999)",
    "batch(3)",
    "indent(99999)",
    "format(1)",
    "reverse",
    "map('upper')",
    "int",
)


def hostile_template(rng: random.Random, depth: int = 0) -> str:
    """A template by a small grammar of what grows, loops and recurs."""

    def expression(depth: int) -> str:
        if depth > 4 or rng.random() < 0.3:
            return rng.choice(_NAMES)
        if rng.random() < 0.4:
            return f"({expression(depth + 1)}) | {rng.choice(_FILTERS)}"
        return f"({expression(depth + 1)}) {rng.choice(_OPERATORS)} ({expression(depth + 1)})"

    def inner() -> str:
        return hostile_template(rng, depth + 1) if depth < 4 else "{{ 1 }}"

    kinds: list[Callable[[], str]] = [
        lambda: "{{ " + expression(0) + " }}",
        lambda: "{% for i in " + expression(2) + " %}" + inner() + "{% endfor %}",
        lambda: (
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
            "{% set ns.x = ns.x ~ ns.x %}" + inner() + "{% endfor %}"
        ),
        lambda: "{% macro f(n) %}" + inner() + "{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
        lambda: "{% set x %}" + inner() + inner() + "{% endset %}{{ x ~ x }}",
        lambda: "{% if " + expression(2) + " %}" + inner() + "{% else %}" + inner() + "{% endif %}",
    ]
    return rng.choice(kinds)()


@contextlib.contextmanager
def in_group(limit: int) -> Iterator[MemoryCgroup | None]:
    from mobile_gguf.memory.cap import create_memory_cgroup

    with create_memory_cgroup(limit) as group:
        yield group


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A server under hostile clients.")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", action="append", choices=tuple(hostile.ATTACKS))
    parser.add_argument("--signals-every", type=float, default=90.0, metavar="SECONDS")
    args = parser.parse_args()
    from mobile_gguf.demo import ensure_demo

    with in_group(LIMIT_BYTES) as group:
        torture = Torture(ensure_demo(), group, args.seed, tuple(args.only or hostile.ATTACKS))
        report = torture.run(args.seconds, args.signals_every)
    print(json.dumps(report, indent=1))
    sys.stdout.flush()
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    os.environ.setdefault("no_proxy", "127.0.0.1,localhost")
    sys.exit(main())
