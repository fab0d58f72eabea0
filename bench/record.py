"""What a measuring module says of itself and leaves behind: command, machine, a page and its figures."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError

from .hardware import describe_hardware


def begin_record(module: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """``command`` and ``hardware`` of ``python -m mobile_gguf.bench.MODULE``; ``argv`` None: sys.argv."""
    words = sys.argv[1:] if argv is None else list(argv)
    return {
        "command": shlex.join(["python", "-m", f"mobile_gguf.bench.{module}", *words]),
        "hardware": describe_hardware(Path.cwd()),
    }


def keep_record(folder: Path | None, name: str, record: dict[str, Any], page: str) -> None:
    """Write ``name``.json and ``name``.md into ``folder``, made if it is missing; None: nothing is kept."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page, encoding="utf-8")


def in_own_process(module: str, words: Sequence[str]) -> Any:
    """What ``python -m mobile_gguf.bench.MODULE WORDS --run`` says, a line of JSON; it is another process."""
    command = [sys.executable, "-m", f"mobile_gguf.bench.{module}", *words, "--run"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a run ended with exit code {done.returncode}: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def keep_runs(out: Path | None, model: str, runs: Sequence[dict[str, Any]]) -> None:
    """Write the hardware of ``model`` and all runs, a line of JSON each; None: nothing is kept."""
    if out is not None:
        lines = [describe_hardware(Path(model)), *runs]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def record_measured(
    module: str,
    argv: Sequence[str] | None,
    measure: Callable[[], dict[str, Any]],
    page_of: Callable[[dict[str, Any]], str],
    folder: Path | None,
) -> int:
    """Measure, print the page and keep both in ``folder``; what goes wrong is one line and exit code 1."""
    record = begin_record(module, argv)
    try:
        record |= measure()
    except (MobileError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = page_of(record)
    print(page)
    keep_record(folder, module, record, page)
    return 0
