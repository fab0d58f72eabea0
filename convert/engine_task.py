"""Native code in a process of its own: what llama.cpp aborts on ends a child, and the command goes on.

A task is a function of a module, called with its arguments and a progress. Arguments, results and errors go
through files in a folder of ours, pickled: both ends are this package.
"""

from __future__ import annotations

import pickle
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.progress import Progress

from .child_side import ChildChannel
from .children import ChildDiedError, child_environment, run_child

CHILD_MODULE = "mobile_gguf.convert.engine_task"
_CALL, _ANSWER = "call", "answer"

Result = TypeVar("Result")


class EngineDiedError(EngineError):
    """The process that ran the engine ended without an answer; says its last line."""


def in_child(function: Callable[..., Result], *arguments: Any, progress: Progress) -> Result:
    """Call ``function(*arguments, progress)`` in a process of its own.

    Raises what it raises, and EngineDiedError if the process dies.
    """
    with tempfile.TemporaryDirectory(prefix="mobile-gguf-engine-") as folder:
        (Path(folder) / _CALL).write_bytes(pickle.dumps((function, arguments)))
        # an abort says what it is in one line; a debugger's trace behind it would say less
        environment = child_environment() | {"GGML_NO_BACKTRACE": "1"}

        def on_event(event: dict[str, Any]) -> bool:
            if "phase" in event:
                progress(str(event["phase"]), float(event["done"]))
            return False

        try:
            run_child(
                CHILD_MODULE, {"folder": folder}, what="the engine", environment=environment,
                on_event=on_event,
            )  # fmt: skip
        except ChildDiedError as error:
            # where it was compiled says nothing to anybody
            line = re.sub(r"\S*/(?=[\w.-]+:\d)", "", error.last_line)
            raise EngineDiedError(f"the engine died: {line or error}") from error
        result, problem = pickle.loads((Path(folder) / _ANSWER).read_bytes())
    if problem is not None:
        raise problem
    return result


def main() -> int:
    """The child's side."""
    channel = ChildChannel()
    folder = Path(channel.job["folder"])
    function, arguments = pickle.loads((folder / _CALL).read_bytes())
    answer: tuple[Any, MobileError | None]
    try:
        answer = function(*arguments, lambda text, done: channel.send(phase=text, done=done)), None
    except MobileError as error:
        answer = None, error
    (folder / _ANSWER).write_bytes(pickle.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
