"""``make windows``: the barrier and the expert store, compiled by mingw-w64 and run by Wine.

    windows.py LAYERS SESSIONS

First faults are planted in what is Windows' own, a barrier that wakes one sleeper of many and a read from
another place: they must be seen.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import stress

IMPATIENT = 5


def main(n_layers: int, n_sessions: int) -> int:
    """The exit status: 0 if the planted faults were seen and nothing else was."""
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder, spoilt = Path(name, "built"), Path(name, "spoilt")
        folder.mkdir()
        spoilt.mkdir()
        amounts = {"barrier_stress": n_layers, "store_stress": n_sessions}
        more = {"barrier_stress": [], "store_stress": [folder / "experts"]}
        for program, amount in amounts.items():
            made = stress.build(program, folder, windows=True)
            faulty = stress.build(
                program, spoilt, windows=True, changes=stress.ON_WINDOWS[program], compiled=folder
            )
            started = time.monotonic()
            done = stress.run(faulty, amount, 1, IMPATIENT, *more[program])
            good &= stress.say(f"{program}, spoilt", done.returncode == 1, started, "the fault was not seen")
            started = time.monotonic()
            done = stress.run(made, amount, 1, stress.PATIENCE, *more[program])
            good &= stress.say(program, done.returncode == 0, started, done.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
