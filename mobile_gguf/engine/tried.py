"""What is known of files that an engine was tried on: that they load, and what its buffers took for them.

Kept in ``cache_dir()/tried-files.json``, with sizes and times of the files, for one engine: another one, or a
changed file, knows nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import complete_or_absent
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.files.stamps import stamps

from .buffers import Buffers, Context

_MAX_FILES = 1000
_MAX_CONTEXTS = 100  # of one file


class TriedFiles:
    """The files that were tried with the engine at ``library``. A cache that cannot be used is none."""

    def __init__(self, library: str) -> None:
        self._path = cache_dir() / "tried-files.json"
        self._engine = _identity(library)

    def holds(self, path: Path, files: Sequence[Path]) -> bool:
        """Whether a file is known to load, unchanged since; ``files`` are all of a split one."""
        return self._of(path, files).get("loads") is True

    def add(self, path: Path, files: Sequence[Path]) -> None:
        """Remember that a file loads."""
        self._update(path, files, loads=True)

    def buffers(self, path: Path, files: Sequence[Path]) -> dict[Context, Buffers]:
        """What was measured of an unchanged file."""
        found = self._of(path, files).get("buffers")
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            return {
                Context.parse(text): Buffers(int(reserved), int(used))
                for text, (reserved, used) in (found or {}).items()
            }
        return {}

    def add_buffers(self, path: Path, files: Sequence[Path], measured: Mapping[Context, Buffers]) -> None:
        """Remember what was measured beside what is known."""
        known = self.buffers(path, files)
        newest = [(context, sizes) for context, sizes in known.items() if context not in measured]
        newest = [*newest, *measured.items()][-_MAX_CONTEXTS:]
        self._update(path, files, buffers={str(one): [sizes.reserved, sizes.used] for one, sizes in newest})

    def runs_block(self, path: Path, files: Sequence[Path]) -> bool:
        """Whether a file's block for multi-token prediction is known to run."""
        return self._of(path, files).get("block") is True

    def add_block(self, path: Path, files: Sequence[Path]) -> None:
        """Remember that a file's block runs."""
        self._update(path, files, block=True)

    def _of(self, path: Path, files: Sequence[Path]) -> dict[str, Any]:
        known = self._load().get(_key(path))
        with contextlib.suppress(OSError):
            if isinstance(known, dict) and known.get("stamps") == stamps(files):
                return known
        return {}

    def _update(self, path: Path, files: Sequence[Path], **facts: object) -> None:
        with contextlib.suppress(MobileError, OSError):
            own = self._of(path, files) | facts | {"stamps": stamps(files)}
            known = self._load()
            known.pop(_key(path), None)
            newest = dict([*known.items(), (_key(path), own)][-_MAX_FILES:])
            with complete_or_absent(self._path) as partial:
                partial.write_text(json.dumps({"engine": self._engine, "files": newest}), encoding="utf-8")

    def _load(self) -> dict[str, Any]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            known = stored["files"] if stored["engine"] == self._engine else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if isinstance(known, dict) else {}


def known_buffers(path: Path, files: Sequence[Path]) -> dict[Context, Buffers]:
    """What the installed engine is known to take for a file; loads nothing and measures nothing."""
    library = _installed()
    return {} if library is None else TriedFiles(library).buffers(path, files)


def installed_engine() -> str:
    """Which engine this is, in a word that another build does not have; empty if none is found."""
    library = _installed()
    return "" if library is None else _identity(library)


def _installed() -> str | None:
    """The library that llama-cpp-python would load."""
    from mobile_gguf.vendor.install import LIBRARIES

    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if not folder:
        # find_spec of a top-level package imports nothing
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            return None
        folder = os.path.join(os.path.dirname(spec.origin), "lib")
    found = (os.path.join(folder, name) for name in LIBRARIES)
    return next((path for path in found if os.path.exists(path)), None)


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()


def _identity(library: str) -> str:
    """Of an engine: its libraries, which lie beside each other."""
    found = [*sorted(Path(library).parent.glob("*ggml*")), Path(library)]
    facts = [[file.name for file in found], stamps(file for file in found if file.exists())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
