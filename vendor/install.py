"""The engine in this Python environment: what is installed, and installing a built wheel."""

import importlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.files import paths

from . import failures, process
from .build import MARKER
from .progress import Progress, ReportProgress, ignore
from .recipe import EngineOptions, Recipe

DISTRIBUTION = "llama-cpp-python"
LIBRARIES = ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll")  # the last one is mingw's


@dataclass(frozen=True)
class Installed:
    """A llama_cpp package in this environment."""

    directory: Path
    version: str
    manifest: dict[str, Any] | None  # None: not built by us

    @property
    def key(self) -> str | None:
        return self.manifest["key"] if self.manifest else None

    @property
    def options(self) -> EngineOptions | None:
        """What it was built with, None for a stock package."""
        if self.manifest is None:
            return None
        options = self.manifest["options"]
        target = options.get("target", "")
        return EngineOptions(tuple(options["backends"]), tuple(options["cmake_args"]), target)

    def is_made_from(self, recipe: Recipe) -> bool:
        """Whether it is what ``recipe`` builds.

        An engine for any processor was compiled elsewhere: its source decides, not this machine's compiler.
        """
        if self.manifest is None:
            return False
        if not (self.options and self.options.target):
            return self.key == recipe.key
        wanted = recipe.manifest()
        return all(self.manifest.get(name) == wanted[name] for name in ("pin", "patches", "sources"))

    @property
    def library(self) -> Path | None:
        """Path of libllama."""
        return next((path for name in LIBRARIES if (path := self.directory / "lib" / name).exists()), None)


def installed_engine() -> Installed | None:
    """The llama_cpp package that an import would find, without importing it; None if there is none."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        return None
    directory = Path(spec.origin).parent
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    try:
        manifest = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        manifest = None
    return Installed(directory, version, manifest)


def missing_dependencies() -> list[str]:
    """Names of the run-time dependencies of llama-cpp-python that are not installed."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [DISTRIBUTION]
    names = [re.split(r"[^\w.-]", text)[0] for text in requirements if "extra ==" not in text]
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install_wheel(wheel: Path, *, progress: ReportProgress = ignore) -> None:
    """Install a built wheel into the running environment, with the dependencies that are missing.

    Raises:
        EngineBuildError: pip refuses or fails; the text says why.
    """
    progress(Progress("installing"))
    log = paths.engine_cache_dir() / "logs" / "install.log"
    log.unlink(missing_ok=True)
    # its dependencies stay as they are: replacing the engine must not change the user's numpy
    _pip(["--no-deps", "--force-reinstall", str(wheel)], log)
    importlib.invalidate_caches()
    if missing_dependencies():
        progress(Progress("installing dependencies"))
        _pip([str(wheel)], log)
        importlib.invalidate_caches()


def _pip(arguments: Sequence[str], log: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    status, lines = process.run([*pip, *arguments], log=log)
    if status != 0:
        raise EngineBuildError(f"cannot install the engine: {failures.explain_pip(lines, log)}")
