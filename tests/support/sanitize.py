"""``make sanitize``: the waiting and the expert store under ThreadSanitizer, and the check of that check.

    sanitize.py LAYERS SESSIONS

First two faults are planted, a barrier and a store whose threads are not ordered: they must be caught.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import stress

SEEDS = range(1, 4)


def main(n_layers: int, n_sessions: int) -> int:
    """The exit status: 0 if all faults were caught and nothing else was found."""
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder, spoilt = Path(name, "built"), Path(name, "spoilt")
        folder.mkdir()
        spoilt.mkdir()
        amounts = {"barrier_stress": [n_layers], "store_stress": [n_sessions]}
        more = {"barrier_stress": [], "store_stress": [folder / "experts"]}
        for program, amount in amounts.items():
            made = stress.build(program, folder, sanitize=True)
            faulty = stress.build(
                program, spoilt, sanitize=True, changes=stress.UNORDERED[program], compiled=folder
            )
            started = time.monotonic()
            done = stress.run(faulty, *amount, 1, stress.PATIENCE, *more[program])
            good &= stress.say(
                f"{program}, spoilt", done.returncode == stress.RACE, started, "no race was found"
            )
            for seed in SEEDS:
                started = time.monotonic()
                done = stress.run(made, *amount, seed, stress.PATIENCE, *more[program])
                good &= stress.say(f"{program}, seed {seed}", done.returncode == 0, started, done.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
