"""Each task in a fork of this process, so that what kills one leaves the others' results as they are."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_LAST = 1500


def in_forks(tasks: Mapping[str, Callable[[], Any]], *, workers: int = 1) -> dict[str, Any]:
    """By name what each task returned (as JSON), or {"died": how, with the end of what it wrote}.

    What a task writes to stdout or stderr is kept from this process's: a library that aborts starts a
    debugger, which writes to both.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        waiting, running = list(tasks), {}
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                place = Path(scratch) / str(len(found) + len(running))
                place.mkdir()
                child = os.fork()
                if not child:
                    _work(tasks[name], place)
                running[child] = name, place
            child, status = os.wait()
            name, place = running.pop(child)
            found[name] = _result(place, os.waitstatus_to_exitcode(status))
    return found


def _work(task: Callable[[], Any], place: Path) -> None:
    """Never returns."""
    code = 1
    try:
        said = os.open(place / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ["GGML_NO_BACKTRACE"] = "1"  # the debugger takes seconds
        result = json.dumps(task())
        (place / "result").write_text(result, encoding="utf-8")
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _result(place: Path, code: int) -> Any:
    if code == 0:
        return json.loads((place / "result").read_text(encoding="utf-8"))
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    said = (place / "said").read_text(encoding="utf-8", errors="replace")
    return {"died": f"the process ended {how}: {said[-_LAST:]}"}
