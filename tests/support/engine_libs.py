"""Finds the two builds of the library and the pinned source, and runs ``engine_child`` on either build.

For development $MOBILE_GGUF_ENGINE_LIB, $MOBILE_GGUF_STOCK_LIB (folders with libllama) and
$MOBILE_GGUF_SOURCE (the unpacked sdist) name them; otherwise they are the installed ones. What is missing
skips the test that needs it, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

CHILD = Path(__file__).with_name("engine_child.py")


@dataclass
class Outcome:
    """What a job returned: results per run, and the arrays it saved as "run/name"."""

    runs: dict[str, Any]
    arrays: dict[str, np.ndarray]
    returncode: int = 0

    def ops(self, run: str, kind: str) -> list[dict[str, Any]]:
        """The results of all ops of one kind in a run, in order."""
        return [op for op in self.runs[run]["ops"] if op["op"] == kind]


class ChildDiedError(AssertionError):
    """The process ended before its job did: a crash, or the kernel's memory limit."""

    def __init__(self, returncode: int, stderr: str) -> None:
        super().__init__(f"the process ended with {returncode} before its job did; stderr:\n{stderr[-3000:]}")
        self.returncode = returncode


def _missing(what: str, how: str) -> NoReturn:
    pytest.skip(f"{what} not found: {how}", allow_module_level=True)


def _is_patched(folder: Path) -> bool:
    """Whether the libllama in ``folder`` is ours; looks for the symbol's name, so as not to load it here."""
    for name in ("libllama.so", "libllama.dylib"):
        path = folder / name
        if path.exists():
            return b"mobile_abi_version" in path.read_bytes()
    return False


def engine_lib() -> Path:
    """Folder of the patched libllama."""
    if named := os.environ.get("MOBILE_GGUF_ENGINE_LIB"):
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        _missing("the engine", "run `mobile-gguf engine build`")
    folder = Path(spec.origin).parent / "lib"
    if not _is_patched(folder):
        _missing("the engine", f"{folder} is a stock build; run `mobile-gguf engine build`")
    return folder


def stock_lib() -> Path:
    """Folder of the unpatched libllama of the same pin."""
    if named := os.environ.get("MOBILE_GGUF_STOCK_LIB"):
        return Path(named)
    try:
        from mobile_gguf.vendor import stock_lib_dir
    except ImportError:
        _missing("the stock build", "mobile_gguf.vendor does not offer stock_lib_dir()")
    folder = stock_lib_dir()
    if folder is None or not Path(folder).is_dir():
        _missing("the stock build", "run `mobile-gguf engine build --stock`")
    return Path(folder)


def source_tree() -> Path:
    """Folder of the pinned llama.cpp."""
    if named := os.environ.get("MOBILE_GGUF_SOURCE"):
        return Path(named) / "vendor" / "llama.cpp"
    from mobile_gguf.vendor.pin import load_pin
    from mobile_gguf.vendor.source import unpacked_source

    return unpacked_source(load_pin()) / "vendor" / "llama.cpp"


def child_environment(lib: Path, **extra: str) -> dict[str, str]:
    return {**os.environ, "LLAMA_CPP_LIB_PATH": str(lib), "OMP_NUM_THREADS": "2", **extra}


def run_job(
    lib: Path,
    runs: list[dict[str, Any]],
    *,
    on_pause: dict[str, Callable[[], None]] | None = None,
    prefix: list[str] | None = None,
    environment: dict[str, str] | None = None,
    child: Path = CHILD,
) -> Outcome:
    """Runs ``runs`` (see ``engine_child``) on the build in ``lib``.

    on_pause: what to do at each ``pause`` op, by its name. prefix: a command that starts the child (e.g. one
    that puts itself under a memory limit first). child: the program. Raises ChildDiedError if the process did
    not finish the job.
    """
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "stderr", "w+") as stderr:
        out = Path(scratch) / "out.npz"
        process = subprocess.Popen(
            [*(prefix or []), sys.executable, str(child)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=child_environment(lib, **(environment or {})),
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; told below
                process.stdin.write(json.dumps({"out": str(out), "runs": runs}) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "pause" in answer:
                    (on_pause or {})[answer["pause"]]()
                    with contextlib.suppress(BrokenPipeError):  # it died in the pause
                        process.stdin.write("go\n")
                        process.stdin.flush()
            process.wait()
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
        stderr.seek(0)
        if process.returncode != 0 or "runs" not in answer:
            raise ChildDiedError(process.returncode, stderr.read())
        with np.load(out) as arrays:
            return Outcome(answer["runs"], dict(arrays), process.returncode)
