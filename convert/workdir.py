"""A hidden folder beside the output for what exists only while a conversion runs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import disk_errors
from mobile_gguf.files.lock import exclusive


def work_path(out: Path) -> Path:
    """Where the intermediates of ``out`` stand."""
    return out.with_name(f".{out.name}.work")


@contextmanager
def work_directory(out: Path) -> Iterator[Path]:
    """Give an empty folder on the disk of ``out``; it is removed in every case but that of a killed process.

    What a killed one left is removed by the next for the same output. Raises MobileError if another process
    is converting to ``out`` now, or if the disk refuses.
    """
    folder = work_path(out)

    def refuse() -> None:
        raise MobileError(f"cannot write {out}: another process is converting to it now")

    with disk_errors(out, remedy=", or write to another disk with -o"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / "lock", on_wait=refuse):
            try:
                for path in folder.iterdir():
                    if path.name != "lock":
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        if os.name == "nt":  # the lock was open: now it goes, unless another has it by now
            with contextlib.suppress(OSError):
                (folder / "lock").unlink()
                folder.rmdir()
