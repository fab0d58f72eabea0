"""A long run of many impatient clients against one server: nothing leaks, nothing is lost.

``python -m mobile_gguf.bench.serve_soak MODEL --minutes 10`` starts ``mobile-gguf serve`` and lets
``--clients`` threads have conversations with it, streamed and whole, edited and answered anew, some of them
hanging up in the middle. ``--restarts N`` times it is ended, by SIGTERM and SIGKILL in turn, and started
again. At the end every request that was waited for must have had its answer, a 429, or a restart; answers
must have been begun in the order their requests came, receipts must fit their answers and the server's sums,
conversations go on after an orderly restart, their files stay within ``--session-cache``, the model must be
free, and each server's memory and file descriptors must be what they were after a tenth of its time. With
``--embeddings`` a part of the requests are for embeddings. Prints one JSON object, and writes it and a page
with ``--out``; exit code 1 if something is wrong. Unknown flags go to ``mobile-gguf serve``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from mobile_gguf.files.lock import exclusive
from mobile_gguf.files.paths import APP
from mobile_gguf.generate.sessions.session_store import SessionFolder
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.sizes import parse_bytes

from .hardware import describe_hardware
from .soak_client import TIMEOUT, Client
from .soak_server import SoakServer

# Memory that a server may take on after its first tenth: allocator slack, caches of templates and grammars,
# and texts that were put away, of which --prefix-cache bounds the bytes.
_SLACK_BYTES = 48 << 20
_SLACK_FILES = 8
_SESSION_CACHE = "--session-cache"
# The server's sums, and what of a receipt goes into them.
_HITS = ("mobile_gguf_expert_hits_total", "mobile_gguf_expert_misses_total")
_REQUESTS = "mobile_gguf_requests_total"
_LEAST_TO_JUDGE = 10


def soak(
    model: str,
    seconds: float,
    n_clients: int,
    flags: Sequence[str] = (),
    seed: int = 0,
    n_restarts: int = 0,
    modes: tuple[str, ...] = ("exact", "little"),
) -> dict[str, Any]:
    """Run it; returns what happened, ``problems`` being what should not have."""
    flags = list(flags) if _SESSION_CACHE in flags else [*flags, _SESSION_CACHE, "2GiB"]
    session_bytes = parse_bytes(flags[flags.index(_SESSION_CACHE) + 1]).n_bytes or 0
    path = str(resolve_model(model))
    with tempfile.TemporaryDirectory() as cache:
        server = SoakServer(path, flags, {"XDG_CACHE_HOME": cache})
        clients = [Client(server, seed + i, "--embeddings" in flags, modes) for i in range(n_clients)]
        watch = _Watch(server, Path(cache) / APP / "sessions")
        problems: list[str] = []
        servers: list[dict[str, Any]] = []
        started = time.monotonic()
        try:
            for client in clients:
                client.start(started + seconds)
            watch.start()
            for i in range(n_restarts + 1):
                servers.append(_run(server, clients, started + seconds * (i + 1) / (n_restarts + 1)))
                if i < n_restarts:
                    servers[-1]["after"] = server.resources()
                    problems.append(server.restart((signal.SIGTERM, signal.SIGKILL)[i % 2]))
            for client in clients:
                client.join()
            sums = _sums_once_free(server.url)
            servers[-1]["after"] = server.resources()
            took = time.monotonic() - started
        finally:
            watch.stop()
            problems.append(server.end())
    problems += [problem for client in clients for problem in client.problems]
    problems += _grown(servers) + _out_of_order(clients)
    report = {
        "command": ["mobile-gguf", "serve", model, *server.command[5:]],
        "hardware": describe_hardware(Path.cwd()),
        "seconds": round(took, 1),
        "clients": n_clients,
        "requests": sum(client.n_sent for client in clients),
        "outcomes": dict(sorted(_outcomes(clients).items())),
        "in_order": sum(len(client.turns) for client in clients),
        "longest_wait_s": round(max((client.longest_wait for client in clients), default=0.0), 2),
        "servers": servers,
        "session_bytes": {"limit": session_bytes, "most": watch.most_bytes},
        "after_restart": {
            "asked": sum(client.n_after_restart for client in clients),
            "went_on": sum(client.n_went_on for client in clients),
        },
        "rss_mib_by_second": watch.samples,
    }
    problems += _of_report(report, sums, clients, server.generation)
    return report | {"problems": [problem for problem in problems if problem]}


def _run(server: SoakServer, clients: Sequence[Client], until: float) -> dict[str, Any]:
    """Wait until then; what the server took after a tenth of the time."""
    begun, n_before = time.monotonic(), sum(client.n_ended for client in clients)
    time.sleep(max(0.0, (until - begun) / 10))
    while time.monotonic() < until and sum(client.n_ended for client in clients) < n_before + 4 * len(
        clients
    ):
        time.sleep(0.1)  # on a slow machine its first tenth is still the start
    before = server.resources()
    time.sleep(max(0.0, until - time.monotonic()))
    return {"before": before}


def _outcomes(clients: Sequence[Client]) -> Counter[str]:
    return sum((client.outcomes for client in clients), Counter())


def _grown(servers: Sequence[dict[str, Any]]) -> list[str]:
    problems = []
    for i, one in enumerate(servers, 1):
        before, after = one["before"], one["after"]
        if after["anonymous_bytes"] > before["anonymous_bytes"] + _SLACK_BYTES:
            problems.append(f"memory of server {i} grew")
        if after["files"] > before["files"] + _SLACK_FILES:
            problems.append(f"file descriptors of server {i} grew")
    return problems


def _out_of_order(clients: Sequence[Client]) -> list[str]:
    turns = sorted(turn for client in clients for turn in client.turns)
    by_coming = sorted((generation, number) for generation, _, number in turns)
    is_kept = [(generation, number) for generation, _, number in turns] == by_coming
    return [] if is_kept else ["the order was not kept"]


def _of_report(
    report: dict[str, Any], sums: dict[str, float] | None, clients: Sequence[Client], generation: int
) -> list[str]:
    """What is wrong with sessions and with the last server's sums."""
    problems = []
    sessions, restarted = report["session_bytes"], report["after_restart"]
    if sessions["most"] > sessions["limit"]:
        problems.append("conversations on disk took more than --session-cache")
    if restarted["asked"] >= _LEAST_TO_JUDGE and not restarted["went_on"]:
        problems.append("no conversation went on after a restart")
    if sums is None:
        return [*problems, "the model was not free at the end"]
    hits = sum(client.hits[generation] for client in clients)
    if not 0 < hits <= sum(sums[name] for name in _HITS):
        problems.append(f"receipts count {hits} experts, the server {[sums[name] for name in _HITS]}")
    if sums[_REQUESTS] > report["requests"]:
        problems.append(f"the server counts {sums[_REQUESTS]} requests of {report['requests']}")
    return problems


def _sums_once_free(url: str) -> dict[str, float] | None:
    """What the server has counted once nothing runs any more; None if something does."""
    for _ in range(6000):
        health = httpx.get(f"{url}/health", timeout=TIMEOUT).json()
        if not health["busy"] and not health["waiting"]:
            break
        time.sleep(0.05)
    else:
        return None
    sums: dict[str, float] = dict.fromkeys((*_HITS, _REQUESTS), 0.0)
    for line in httpx.get(f"{url}/metrics", timeout=TIMEOUT).text.splitlines():
        name, _, value = line.rpartition(" ")
        endpoint = name.partition("{")[2]
        name = name.partition("{")[0]
        if name in sums and (not endpoint or "/v1/" in endpoint):
            sums[name] += float(value)
    return sums


class _Watch:
    """Notes a server's memory every ten seconds, and the most that conversations took on disk."""

    def __init__(self, server: SoakServer, folder: Path) -> None:
        self.samples: list[tuple[int, float]] = []
        self.most_bytes = 0
        self._server, self._folder = server, folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        quarters = 0
        while not self._ended.wait(0.25):
            quarters += 1
            if self._folder.is_dir():
                with exclusive(self._folder / "lock"):  # or files come and go while they are counted
                    self.most_bytes = max(self.most_bytes, SessionFolder(self._folder).n_bytes)
            if quarters % 40:
                continue
            try:
                size = self._server.resources()["rss_bytes"]
            except (OSError, KeyError):  # it is started anew
                continue
            self.samples.append((quarters // 4, round(size / (1 << 20), 1)))


def as_page(report: dict[str, Any], asked: str) -> str:
    """The report in words and figures; ``asked`` is the command that made it."""
    samples, sessions, restarted = (
        report["rss_mib_by_second"], report["session_bytes"], report["after_restart"],
    )  # fmt: skip
    rows = [
        ("clients", report["clients"]),
        ("seconds", report["seconds"]),
        ("requests sent", report["requests"]),
        *((f"... {name}", n) for name, n in report["outcomes"].items()),
        ("answers whose turn was checked against their coming", report["in_order"]),
        ("longest wait in line", f"{report['longest_wait_s']} s"),
        ("turns of conversations that were there before an orderly restart", restarted["asked"]),
        ("... and had a part of it kept", restarted["went_on"]),
        ("conversations on disk, at most", f"{_mib(sessions['most'])} of {_mib(sessions['limit'])}"),
    ]
    for i, one in enumerate(report["servers"], 1):
        before, after = one["before"], one["after"]
        both = " to ".join(_mib(state["anonymous_bytes"]) for state in (before, after))
        rows.append((f"server {i}: memory after its first tenth, and at its end", both))
        rows.append(("... open files", f"{before['files']} to {after['files']}"))
    rows.append(("problems", "; ".join(report["problems"]) or "none"))
    lines = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    every = samples[:: max(1, len(samples) // 10)]
    told = ", ".join(f"{size:.0f} MiB at {second} s" for second, size in every)
    lines += ["", f"Memory with mapped files: {told}."]
    lines += [
        "",
        "`left`: hung up before its end; `full`: a 429 with Retry-After, back after 50 ms all the same.",
        "",
        "```",
        asked,
        "```",
    ]
    return "\n".join([*lines, "", f"Machine: {report['hardware']}", ""])


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):.1f} MiB"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Many impatient clients against one server.")
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=0, metavar="N")
    parser.add_argument("--modes", default="exact,little", metavar="MODE,...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write soak.json and soak.md there")
    args, flags = parser.parse_known_args()
    modes = tuple(args.modes.split(","))
    report = soak(args.model, args.minutes * 60, args.clients, flags, args.seed, args.restarts, modes)
    print(json.dumps(report))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        asked = f"python -m mobile_gguf.bench.serve_soak {shlex.join(sys.argv[1:])}"
        (args.out / "soak.md").write_text(as_page(report, asked), encoding="utf-8")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
