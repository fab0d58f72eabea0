"""Runs ``show``, ``plan`` and ``run`` on files with one change in the header, in forked children.

``python tests/support/header_torture.py [--every N] NAME...`` tries every N-th change of tiny models' headers
and ends with 1 if one ends other than with an exit code of the CLI, in more than a line, or by a signal.

The commands' modules are imported once: a child is a fork that loads nothing before, so it costs what the
command itself costs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from header_changes import Header

_GOOD_CODES = (0, 1, 2, 4)
_SECONDS = 240
_ADDRESS_SPACE = 16 << 30
NAMES = ("qwen3moe", "deepseek3", "gpt-oss", "nemotron-h", "gemma4", "llama4")


def commands(path: Path) -> dict[str, list[str]]:
    """The command lines that are tried, by verb."""
    return {
        "show": ["show", str(path)],
        "plan": ["plan", "--no-measure", str(path)],
        "run": ["run", str(path), "--raw", "-n", "2", "-c", "64", "--ram-budget", "50%", "hi"],
    }


@dataclass(frozen=True)
class End:
    """How a command ended: its exit code, below 0 for a signal, and stderr."""

    code: int
    stderr: str

    @property
    def fault(self) -> str:
        """What is wrong with that; empty if nothing is."""
        lines = [line for line in self.stderr.splitlines() if "mobile-gguf: note:" not in line]
        errors = [line for line in lines if line.startswith("mobile-gguf: error: ")]
        if self.code not in _GOOD_CODES:
            return f"exit code {self.code}: {self.stderr[-300:]}"
        if "Traceback" in self.stderr or "Exception ignored" in self.stderr:
            return f"a traceback: {self.stderr[-600:]}"
        if self.code and (len(errors) != 1 or len(lines) != 1):
            return f"exit code {self.code} with {len(lines)} lines: {self.stderr[-300:]}"
        return ""


def run_forked(arguments: Sequence[str]) -> End:
    """The CLI in a forked child of this process, which must not have loaded a model."""
    with tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            _child(arguments, stderr.fileno())
        _, status = os.waitpid(pid, 0)
        stderr.seek(0)
        return End(os.waitstatus_to_exitcode(status), stderr.read().decode(errors="replace"))


def _child(arguments: Sequence[str], stderr: int) -> None:
    code = 70
    try:
        signal.alarm(_SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(stderr, 2)
        from mobile_gguf.cli import main

        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        sys.stderr.flush()
        sys.stdout.flush()
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        os._exit(code)


def prepare() -> None:
    """Import what the commands import, once for all children."""
    import llama_cpp
    import llama_cpp.llama_chat_format  # noqa: F401  pyright: ignore[reportUnusedImport]

    import mobile_gguf.api.model
    import mobile_gguf.cli
    import mobile_gguf.generate.llama
    import mobile_gguf.plan.planner

    mobile_gguf.cli.make_parser()


def torture(
    path: Path, scratch: Path, wanted: Iterable[int] | None = None, ends: Counter[str] | None = None
) -> list[str]:
    """Try the changes of ``path``'s header, those of the numbers ``wanted`` or all; returns what is wrong."""
    header = Header(path)
    target = scratch / "changed.gguf"
    faults: list[str] = []
    for number in range(len(header.changes)) if wanted is None else wanted:
        change = header.changes[number]
        target.write_bytes(header.changed(change))
        for verb, arguments in commands(target).items():
            end = run_forked(arguments)
            if ends is not None:
                ends[f"{verb} {end.code}"] += 1
            if end.fault:
                faults.append(f"{path.parent.name}, change {number}, {change.what}; {verb}: {end.fault}")
    return faults


def main() -> int:
    """Run what the command line says."""
    import tiny_models

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--every", type=int, default=1, help="try every N-th change")
    parser.add_argument("--first", type=int, default=0, help="begin with this change")
    given = parser.parse_args()
    prepare()
    n_faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names:
            path = tiny_models.path(name)
            ends: Counter[str] = Counter()
            changes = range(given.first, len(Header(path).changes), given.every)
            faults = torture(path, Path(folder), changes, ends)
            n_faults += len(faults)
            print(f"{name}: {len(changes)} changes, {len(faults)} faults; {dict(sorted(ends.items()))}")
            print("".join(f"  {fault}\n" for fault in faults), end="", flush=True)
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
