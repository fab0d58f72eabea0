"""Results of a long measurement, kept as they come, so that a stopped one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.files.atomic import complete_or_absent, disk_errors

Arrays = dict[str, npt.NDArray[Any]]


class Checkpoint:
    """A folder of arrays by name, for one measurement: ``key`` says all that its results depend on."""

    def __init__(self, root: Path, key: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = root / digest[:16]
        self.n_reused = 0

    def get(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What was stored under ``name``, else what ``make`` gives, which is stored."""
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
            self.n_reused += 1
            return arrays
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            pass  # not there, or damaged: it is made anew
        arrays = make()
        with complete_or_absent(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        return arrays

    def clear(self) -> None:
        """Forget everything."""
        with disk_errors(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
