"""``mobile-gguf calibrate`` with few settings, so that it takes seconds; dies at the result it is told to.

argv: the number of checkpoint results to make before it kills itself (-1: never), then the command line.
Without argv it is the process that runs the engine for the other one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from mobile_gguf.cli import main
from mobile_gguf.convert import engine_task
from mobile_gguf.convert.calibrate import curves, head
from mobile_gguf.convert.calibrate.checkpoint import Checkpoint

GAMMAS, SHARES = (0.7,), (30,)
DIE_AFTER = "CALIBRATE_CHILD_DIES_AFTER"


def die_after(n_results: int) -> None:
    """Replace Checkpoint.get by one that does not come back when it should make one result more."""
    get, made = Checkpoint.get, [0]

    def dying(self: Checkpoint, name: str, make: Any) -> Any:
        def counted() -> Any:
            if made[0] == n_results:
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            made[0] += 1
            return make()

        return get(self, name, counted)

    Checkpoint.get = dying


if __name__ == "__main__":
    curves.GAMMAS, head.SHARES = GAMMAS, SHARES
    if len(sys.argv) > 1:
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ |= {DIE_AFTER: sys.argv[1], "PYTHONPATH": os.pathsep.join(filter(None, path))}
        engine_task.CHILD_MODULE = "calibrate_child"
        sys.exit(main(["calibrate", *sys.argv[2:]]))
    die_after(int(os.environ[DIE_AFTER]))
    sys.exit(engine_task.main())
