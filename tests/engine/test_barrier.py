"""The barrier without the engine: thousands of short layers, in teams of one to eight threads.

``make sanitize`` runs more of them, and the store, watched for data races.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import stress

LAYERS = 400  # for each of four pairs of teams
IMPATIENT = 2


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "watched"])
def test_nobody_is_lost_and_all_see_what_all_wrote(tmp_path: Path, sanitize: bool) -> None:
    program = stress.build("barrier_stress", tmp_path, sanitize=sanitize)
    done = stress.run(program, LAYERS, 1, stress.PATIENCE)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("fault", ["one of the sleepers is woken", "nobody counts as asleep"])
def test_a_thread_that_is_lost_is_seen(tmp_path: Path, fault: str) -> None:
    program = stress.build("barrier_stress", tmp_path, changes=stress.LOST[fault])
    done = stress.run(program, LAYERS, 1, IMPATIENT)
    assert done.returncode == 1
    assert "nothing moves any more" in done.stderr


def test_a_barrier_that_orders_nothing_is_seen(tmp_path: Path) -> None:
    program = stress.build(
        "barrier_stress", tmp_path, sanitize=True, changes=stress.UNORDERED["barrier_stress"]
    )
    done = stress.run(program, LAYERS, 1, stress.PATIENCE)
    assert done.returncode == stress.RACE, done.stderr
    assert "data race" in done.stderr
