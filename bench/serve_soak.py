"""A long run of many impatient clients against one server: nothing leaks, nothing is lost.

``python -m mobile_gguf.bench.serve_soak MODEL --minutes 10`` starts ``mobile-gguf serve`` and lets
``--clients`` threads ask it, streamed and whole, some of them hanging up in the middle. At the end every
request that was waited for must have had its answer or a 429, answers must have been computed in the order
their requests came in, the model must be free, and the server's memory and file descriptors must be what
they were after the first tenth. With ``--embeddings`` a part of the requests are for embeddings. Prints one
JSON object, and writes it and a page with ``--out``; exit code 1 if something is wrong. Unknown flags go to
``mobile-gguf serve``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hardware import describe_hardware

_TIMEOUT = 300.0
# Memory that a server may take on after its first tenth: allocator slack, caches of templates and grammars.
_SLACK_BYTES = 48 << 20
_SLACK_FILES = 8


def soak(
    model: str, seconds: float, n_clients: int, flags: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Run it; returns what happened, ``problems`` being what should not have."""
    command = [sys.executable, "-m", "mobile_gguf", "serve", model, "--port", "0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    if not url:
        raise SystemExit(f"the server did not start (exit code {server.wait()})")
    clients = [_Client(url, seed + i, "--embeddings" in flags) for i in range(n_clients)]
    watch = _Watch(server.pid)
    try:
        started = time.monotonic()
        end = started + seconds
        for client in clients:
            client.start(end)
        watch.start()
        time.sleep(seconds / 10)
        while time.monotonic() < end and sum(client.n_ended for client in clients) < 4 * n_clients:
            time.sleep(0.1)  # on a slow machine its first tenth is still the start
        before = _resources(server.pid)
        for client in clients:
            client.join()
        free = _wait_until_free(url)
        after = _resources(server.pid)
        took = time.monotonic() - started
    finally:
        watch.stop()
        server.send_signal(signal.SIGTERM)
        try:
            code = server.wait(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            server.kill()
            code = None
    outcomes: Counter[str] = sum((client.outcomes for client in clients), Counter())
    problems = [problem for client in clients for problem in client.problems]
    if not free:
        problems.append("the model was not free at the end")
    if code != 0:
        problems.append(f"the server ended with {code}")
    if after["rss_bytes"] > before["rss_bytes"] + _SLACK_BYTES:
        problems.append("memory grew")
    turns = sorted(turn for client in clients for turn in client.turns)
    if [number for _turn, number in turns] != sorted(number for _turn, number in turns):
        problems.append("the order was not kept")
    if after["files"] > before["files"] + _SLACK_FILES:
        problems.append("file descriptors grew")
    return {
        "command": ["mobile-gguf", *command[3:]],
        "hardware": describe_hardware(Path.cwd()),
        "seconds": round(took, 1),
        "clients": n_clients,
        "requests": sum(client.n_sent for client in clients),
        "outcomes": dict(sorted(outcomes.items())),
        "in_order": len(turns),
        "longest_wait_s": round(max((client.longest_wait for client in clients), default=0.0), 2),
        "before": before,
        "after": after,
        "rss_mib_by_second": watch.samples,
        "problems": problems,
    }


class _Watch:
    """Notes a process's memory every ten seconds."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[int, float]] = []
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        second = 0
        while not self._ended.wait(10):
            second += 10
            try:
                size = _resources(self._pid)["rss_bytes"]
            except OSError:
                return
            self.samples.append((second, round(size / (1 << 20), 1)))


class _Client:
    """Asks again and again; hangs up at random, and holds what it did wait for against what it asked for."""

    def __init__(self, url: str, seed: int, embeds: bool) -> None:
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.turns: list[tuple[int, int]] = []
        self.n_sent = 0
        self.longest_wait = 0.0
        self._embeds = embeds
        self._url = url
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._run)
        self._end = 0.0

    @property
    def n_ended(self) -> int:
        """Requests so far that came to an end of whatever kind."""
        return sum(list(self.outcomes.values()))

    def start(self, end: float) -> None:
        self._end = end
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        import httpx

        with httpx.Client(timeout=_TIMEOUT) as http:
            while time.monotonic() < self._end:
                self.n_sent += 1
                try:
                    ask = self._embed if self._embeds and self._random.random() < 0.1 else self._ask
                    self.outcomes[ask(http)] += 1
                except Exception as error:  # whatever it is, it is a finding
                    self.problems.append(f"{type(error).__name__}: {error}")
                    return

    def _embed(self, http: Any) -> str:
        texts = ["word " * self._random.randint(1, 9) for _ in range(self._random.randint(1, 4))]
        answer = http.post(f"{self._url}/v1/embeddings", json={"input": texts})
        if answer.status_code == 429:
            return self._full(answer)
        if answer.status_code != 200 or len(answer.json()["data"]) != len(texts):
            raise RuntimeError(f"status {answer.status_code}: {answer.text:.200}")
        return "embedded"

    def _ask(self, http: Any) -> str:
        import httpx

        stream = self._random.random() < 0.6
        leaves = self._random.random() < 0.4
        n = self._random.randint(1, 12)
        body = {
            "messages": [{"role": "user", "content": f"Count to {self._random.randint(2, 99)}."}],
            "max_tokens": n,
            "stream": stream,
            "stream_options": {
                "include_usage": True,
                "continuous_usage_stats": self._random.random() < 0.5,
            },
            "mode": self._random.choice(["exact", "little"]),
            "logit_bias": {str(self._random.randint(0, 99)): self._random.randint(-100, 100)},
            "grammar": "root ::= [a-z ] root",  # has no end: every answer is as long as asked
        }
        path = f"{self._url}/v1/chat/completions"
        if leaves and not stream:
            try:
                answer = http.post(path, json=body, timeout=self._random.uniform(0.01, 0.5))
            except httpx.TimeoutException:
                return "left"
            return self._whole(answer, n)
        if not stream:
            return self._whole(http.post(path, json=body), n)
        with http.stream("POST", path, json=body) as answer:
            if answer.status_code == 429:
                return self._full(answer)
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}: {answer.read()!r:.200}")
            events = []
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                if leaves and len(events) > n // 2:
                    return "left"
        return self._streamed(events, n)

    def _full(self, answer: Any) -> str:
        if int(answer.headers["retry-after"]) < 1:
            raise RuntimeError("429 without a Retry-After")
        time.sleep(0.05)
        return "full"

    def _whole(self, answer: Any, n: int) -> str:
        if answer.status_code == 429:
            return self._full(answer)
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {answer.text:.200}")
        return self._counted(answer.json()["usage"], n)

    def _streamed(self, events: list[str], n: int) -> str:
        if not events or events[-1] != "[DONE]":
            raise RuntimeError(f"a stream without an end: {events[-1:]}")
        return self._counted(json.loads(events[-2]).get("usage") or {}, n)

    def _counted(self, usage: dict[str, Any], n: int) -> str:
        if usage.get("completion_tokens") != n:
            raise RuntimeError(f"asked for {n} tokens, got {usage.get('completion_tokens')}")
        line = usage["queue"]
        self.turns.append((line["turn"], line["number"]))
        self.longest_wait = max(self.longest_wait, line["wait_ms"] / 1e3)
        return "answered"


def _wait_until_free(url: str) -> bool:
    import httpx

    for _ in range(6000):
        health = httpx.get(f"{url}/health", timeout=_TIMEOUT).json()
        if not health["busy"] and not health["waiting"]:
            return True
        time.sleep(0.05)
    return False


def _resources(pid: int) -> dict[str, int]:
    """Memory and open files of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "files": files}


def as_page(report: dict[str, Any], asked: str) -> str:
    """The report in words and figures; ``asked`` is the command that made it."""
    samples = report["rss_mib_by_second"]
    before, after = report["before"], report["after"]
    rows = [
        ("clients", report["clients"]),
        ("seconds", report["seconds"]),
        ("requests sent", report["requests"]),
        *((f"... {name}", n) for name, n in report["outcomes"].items()),
        ("answers whose turn was checked against their coming", report["in_order"]),
        ("longest wait in line", f"{report['longest_wait_s']} s"),
        ("server's memory after the first tenth", f"{before['rss_bytes'] / (1 << 20):.1f} MiB"),
        ("... at the end", f"{after['rss_bytes'] / (1 << 20):.1f} MiB"),
        ("open files after the first tenth, at the end", f"{before['files']}, {after['files']}"),
        ("problems", "; ".join(report["problems"]) or "none"),
    ]
    lines = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    every = samples[:: max(1, len(samples) // 10)]
    lines += ["", "Memory: " + ", ".join(f"{size:.0f} MiB at {second} s" for second, size in every) + "."]
    lines += [
        "",
        "`left`: hung up before its end; `full`: a 429 with Retry-After, back after 50 ms all the same.",
        "",
        "```",
        asked,
        "```",
    ]
    return "\n".join([*lines, "", f"Machine: {report['hardware']}", ""])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Many impatient clients against one server.")
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write soak.json and soak.md there")
    args, flags = parser.parse_known_args()
    report = soak(args.model, args.minutes * 60, args.clients, flags, args.seed)
    print(json.dumps(report))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        asked = f"python -m mobile_gguf.bench.serve_soak {shlex.join(sys.argv[1:])}"
        (args.out / "soak.md").write_text(as_page(report, asked), encoding="utf-8")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
