"""What the store has of the operating system: reads beyond 4 GiB, and memory that comes and goes.

``make windows`` runs the same program under Wine.
"""

from __future__ import annotations

from pathlib import Path

import stress


def test_reads_and_memory_are_as_promised(tmp_path: Path) -> None:
    done = stress.run(stress.build("os_check", tmp_path), tmp_path)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert not list(tmp_path.glob("*.bin"))


def test_a_neighbours_page_that_goes_is_seen(tmp_path: Path) -> None:
    done = stress.run(stress.build("os_check", tmp_path, changes=stress.NEIGHBOURS), tmp_path)
    assert done.returncode == 1
    assert "all_are" in done.stderr
