"""Files that are complete or absent, and a disk's refusal in one line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobile_gguf.errors import MobileError


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it becomes `path` if the block ends well and is removed if not.

    The temporary name is fixed, so that what a killed process left behind is overwritten by the next one:
    two writers of one path need a lock. Raises MobileError when the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a MobileError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full: free some space there"
        else:
            what = f"{error.strerror or error}: check that the directory can be written"
        raise MobileError(
            f"cannot write {path}: {what}, or set XDG_DATA_HOME and XDG_CACHE_HOME to another disk"
        ) from error
