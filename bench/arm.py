"""Arms: what is compared, and running one once, capped and timed, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from mobile_gguf.engine.split import Split
from mobile_gguf.errors import EngineError
from mobile_gguf.memory.cap import CgroupError, MemoryCgroup, create_memory_cgroup
from mobile_gguf.options.words import DEFAULT_EVICTION, DEFAULT_IO_THREADS
from mobile_gguf.sizes import MIB

from .child import Job
from .other import OtherCommand, run_other
from .text import characters
from .trace import Trace

STDERR_LINES = 20


@dataclass(frozen=True)
class Arm:
    """One system in one mode under one cap. ``budget_bytes`` is what the experts may take; the whole process
    may take ``cap_bytes``. ``load_mode`` is stock's; ``io_threads`` and ``eviction`` are the engine's."""

    system: str  # "engine", "stock" or "other"
    mode: str  # "exact" or "little"
    budget: str  # as asked, such as "12%"
    budget_bytes: int
    cap_bytes: int
    resident: bool = False  # all experts fit
    threads: int = 1
    threads_auto: bool = False  # the engine's: fewer while others compete
    io_threads: int = DEFAULT_IO_THREADS
    load_mode: str = "mmap"
    repack: bool = False
    eviction: str = DEFAULT_EVICTION
    offset: int = 0  # decoding begins so many steps behind the prompt
    prompt_tokens: int = 0  # the trace over and over; 0: its own prompt
    n_ubatch: int = 512
    warm: tuple[tuple[int, int], ...] = ()  # (layer, expert), as the warm set has them
    split: Split | None = None  # of experts in segments; None: whole
    command: OtherCommand | None = None  # of "other"
    idle_s: float = 0.0  # between load and prompt, at most: until the warm set is read

    @property
    def label(self) -> str:
        usual = type(self)
        words = [self.command.name] if self.command is not None else [self.system, self.mode]
        words += [self.eviction] if self.eviction != usual.eviction else []
        return " ".join([*words, self.budget])

    @property
    def settings(self) -> str:
        """What the sweep chose, for the table."""
        if self.command is not None:
            return "as given"
        words = [f"t={self.threads}"]
        if self.system == "engine":
            words.append(f"io={self.io_threads}")
        else:
            words.append(self.load_mode)
        if self.repack:
            words.append("repack")
        return " ".join(words)

    def tuned(self, **settings: Any) -> Arm:
        """The same arm with other settings."""
        return replace(self, **settings)


@dataclass
class ArmRun:
    """One run of an arm. Counts are of decoding, up to the last token that was finished.

    ``read_bytes`` is what the kernel read from disks for the process; ``counters`` are the engine's.
    """

    n_tokens: int = 0
    seconds: float = 0.0  # to the end of the last finished token
    limit_s: float | None = None  # set if the run was stopped after so many seconds of decoding
    load_s: float | None = None
    prompt_s: float | None = None
    prompt_counters: dict[str, int] | None = None
    cpu_s: float | None = 0.0  # None likewise
    read_bytes: int | None = 0  # None: not known of decoding alone
    major_faults: int = 0
    counters: dict[str, int] | None = None
    peak_bytes: int | None = None
    capped: bool = False
    error: str = ""
    bandwidth: float = 0.0  # bytes/s, measured beside this run
    cached_bytes_before: int | None = None
    load_average: float | None = None  # of the machine, over the minute before the run's end
    follows: bool | None = None  # whether the text that another's command printed goes through the trace
    worth: list[list[int]] | None = None  # [layer, expert] of what single tokens used, the most used first
    warm: dict[str, int] | None = None  # what became of the warm set
    ids: list[tuple[int, list[list[int]]]] | None = None  # only where they were asked for

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens over seconds; for a stopped run an upper bound: one token more than were finished."""
        if self.limit_s is not None:
            return (self.n_tokens + 1) / self.limit_s
        return self.n_tokens / self.seconds if self.n_tokens and self.seconds else None


@dataclass(frozen=True)
class Text:
    """Token ids that arms are given: a prompt, and what is decoded behind it, whatever the model says."""

    ids: tuple[int, ...]
    n_prompt: int


def text_of(trace: Trace) -> Text:
    """A trace's steps, which are the replay model's tokens."""
    return Text(tuple(range(trace.n_steps)), trace.n_prompt)


@dataclass(frozen=True)
class Runner:
    """Where arms run: the model, the text, the libraries and the limits that all arms share.

    ``libraries`` maps a system to its library directory; None is llama-cpp-python's own. ``little_k`` experts
    are what a little token uses.
    """

    model: Path
    text: Text
    libraries: dict[str, Path | None]
    little_k: int
    prompt_limit_s: float = 900.0

    def run(self, arm: Arm, n_tokens: int, limit_s: float) -> ArmRun:
        """Decode ``n_tokens`` after the prompt, for at most ``limit_s`` seconds.

        What goes wrong with the arm itself (it does not load, it is killed by its cap) is in ``error``.
        """
        result = ArmRun()
        group: MemoryCgroup | None = None
        # where it may not be, the caller says so once, and ``capped`` stays False
        with contextlib.suppress(CgroupError):
            group = create_memory_cgroup(arm.cap_bytes, "mobile-gguf-bench")
        try:
            if arm.command is not None:
                self._run_other(arm, arm.command, n_tokens, limit_s, group, result)
            else:
                self._run_child(arm, n_tokens, limit_s, group, result)
            if group is not None:
                result.peak_bytes = group.peak_bytes()
                if result.error and group.oom_kills():
                    result.error = "killed: it does not fit under its memory cap"
        finally:
            if group is not None:
                group.remove()
        return result

    def _run_other(
        self,
        arm: Arm,
        command: OtherCommand,
        n_tokens: int,
        limit_s: float,
        group: MemoryCgroup | None,
        result: ArmRun,
    ) -> None:
        values = {
            "model": str(self.model.absolute()),
            "prompt": characters(0, self.text.n_prompt),
            "tokens": str(n_tokens),
            "threads": str(arm.threads),
            "budget_bytes": str(arm.budget_bytes),
            "budget_mib": str(arm.budget_bytes // MIB),
            "cap_bytes": str(arm.cap_bytes),
        }
        said = run_other(command, values, group, self.prompt_limit_s + limit_s)
        result.capped = group is not None
        result.read_bytes = result.cpu_s = None
        result.error = said.error
        if said.tokens_per_s is not None:
            result.n_tokens, result.seconds = n_tokens, n_tokens / said.tokens_per_s
            result.follows = characters(self.text.n_prompt, n_tokens - 1) in said.output
        if said.prompt_tokens_per_s:
            result.prompt_s = self.text.n_prompt / said.prompt_tokens_per_s

    def routed_ids(self, arm: Arm, n_tokens: int) -> list[tuple[int, list[list[int]]]]:
        """(layer, expert ids of each token) of every pass, uncapped; raises EngineError if the run fails."""
        result = ArmRun()
        self._run_child(arm, n_tokens, self.prompt_limit_s, None, result, ids=True)
        if result.error or result.ids is None:
            raise EngineError(f"checking the model's routing failed: {result.error or 'stopped'}")
        return result.ids

    def _run_child(
        self,
        arm: Arm,
        n_tokens: int,
        limit_s: float,
        group: MemoryCgroup | None,
        result: ArmRun,
        *,
        ids: bool = False,
    ) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "mobile_gguf.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(self.libraries[arm.system]),
            # not the caller's: a checkout's own folders must not shadow the installed package
            cwd=self.model.parent,
        )
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
        if stdin is None or stdout is None or stderr is None:
            raise RuntimeError("a child process without pipes")
        narration: list[str] = []
        listener = threading.Thread(target=narration.extend, args=(stderr,), daemon=True)
        listener.start()
        finished = patient = False
        try:
            if group is not None:
                with contextlib.suppress(CgroupError):
                    group.attach(process.pid)
                    result.capped = True
            stdin.write(json.dumps(asdict(self._job(arm, n_tokens, ids))) + "\n")
            stdin.close()
            finished = _follow(stdout, self.prompt_limit_s, limit_s, result)
            patient = result.limit_s is None
        except BrokenPipeError:
            patient = True  # it has ended, and why is in its status and its stderr
        finally:
            status = _end(process, patient)
            listener.join(timeout=5)
        if not finished and not result.error and result.limit_s is None:
            tail = " / ".join(line.strip() for line in narration[-STDERR_LINES:] if line.strip())
            result.error = f"ended with status {status}{': ' + tail[-400:] if tail else ''}"

    def _job(self, arm: Arm, n_tokens: int, ids: bool) -> Job:
        text, first = self.text.ids, self.text.n_prompt + arm.offset
        prompt, decode = text[: self.text.n_prompt], text[first : first + n_tokens]
        if arm.prompt_tokens:
            prompt = (text * -(-arm.prompt_tokens // len(text)))[: arm.prompt_tokens]
        return Job(
            model=str(self.model),
            prompt=list(prompt),
            decode=list(decode),
            engine=arm.system == "engine",
            load_mode=arm.load_mode,
            repack=arm.repack,
            threads=arm.threads,
            threads_auto=arm.threads_auto,
            n_ubatch=arm.n_ubatch,
            decode_k=self.little_k if arm.mode == "little" else 0,
            budget_bytes=0 if arm.resident else arm.budget_bytes,
            io_threads=arm.io_threads,
            eviction=arm.eviction,
            warm=arm.warm,
            split=None if arm.split is None else (arm.split.kept, arm.split.shares),
            idle_s=arm.idle_s,
            ids=ids,
        )


def _environment(library: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("LLAMA_CPP_LIB_PATH", None)
    if library is not None:
        environment["LLAMA_CPP_LIB_PATH"] = str(library)
    return environment


def _end(process: subprocess.Popen[str], patient: bool) -> int:
    """Wait for the child, with patience for one that has said all it had to say; then kill it."""
    try:
        return process.wait(timeout=10 if patient else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _follow(stdout: IO[str], prompt_limit_s: float, limit_s: float, result: ArmRun) -> bool:
    """Take the child's events into ``result``; True if it said it was done. Stops at the limits."""
    lines: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    deadline = time.perf_counter() + prompt_limit_s
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.perf_counter()))
        except queue.Empty:
            if result.prompt_s is None:
                result.error = f"the prompt was not done after {prompt_limit_s:g} s"
            else:
                result.limit_s = limit_s
            return False
        if line is None:
            return False
        event = json.loads(line)
        kind = event["event"]
        if kind == "loaded":
            result.load_s = event["seconds"]
        elif kind == "prompt":
            result.prompt_s, result.prompt_counters = event["seconds"], event.get("counters")
            deadline = time.perf_counter() + limit_s
        elif kind == "token":
            result.n_tokens += 1
            for name in ("seconds", "cpu_s", "read_bytes", "major_faults", "counters"):
                setattr(result, name, event[name])
        elif kind == "error":
            result.error = event["message"]
            return False
        elif kind == "done":
            result.ids, result.worth, result.warm = event["ids"], event["worth"], event["warm"]
            return True
