"""``mobile-gguf calibrate`` with few settings, so that it takes seconds; dies at the result it is told to.

argv: the number of checkpoint results to make before it kills itself (-1: never), then the command line.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from mobile_gguf.cli import main
from mobile_gguf.convert.calibrate import curves, head
from mobile_gguf.convert.calibrate.checkpoint import Checkpoint

GAMMAS, SHARES = (0.7,), (30,)


def die_after(n_results: int) -> None:
    """Replace Checkpoint.get by one that does not come back when it should make one result more."""
    get, made = Checkpoint.get, [0]

    def dying(self: Checkpoint, name: str, make: Any) -> Any:
        def counted() -> Any:
            if made[0] == n_results:
                os.kill(os.getpid(), signal.SIGKILL)
            made[0] += 1
            return make()

        return get(self, name, counted)

    Checkpoint.get = dying


if __name__ == "__main__":
    curves.GAMMAS, head.SHARES = GAMMAS, SHARES
    die_after(int(sys.argv[1]))
    sys.exit(main(["calibrate", *sys.argv[2:]]))
