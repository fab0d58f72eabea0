"""The two things that others ask of this package: make the engine ready, and say what there is."""

import ctypes
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.files import paths
from mobile_gguf.files.lock import exclusive

from . import build, patchset, portable, source, toolchain
from .install import Installed, install_wheel, installed_engine, missing_dependencies
from .pin import load_pin
from .progress import Progress, ReportProgress, ignore
from .recipe import EngineOptions, Recipe

_WAITING = Progress("waiting for another build to finish")


def ensure_engine(
    options: EngineOptions | None = None,
    *,
    stock: bool = False,
    force: bool = False,
    jobs: int | None = None,
    progress: ReportProgress = ignore,
) -> Installed:
    """Make the patched engine ready in this environment, building only what is not there yet.

    Args:
        options: what to build; None for the options of the installed engine, or else the default ones.
        stock: build the unpatched library beside it.
        force: build again from the source distribution.
        jobs: parallel compilations; None for one per processor.

    Raises:
        EngineBuildError: one line that says what is wrong and what to do.
    """
    found = installed_engine()
    kept = found.options if found else None
    recipe = Recipe.create(load_pin(), options or kept or EngineOptions())
    if options is None and kept and kept.target and (force or not _is_ready(recipe, found, stock)):
        # an engine that was compiled elsewhere is not compiled again: this machine makes its own
        recipe = Recipe.create(load_pin(), EngineOptions(kept.backends))
    if force or not _is_ready(recipe, found, stock):
        root = paths.engine_cache_dir()
        try:
            with exclusive(root / "engine" / "lock", on_wait=lambda: progress(_WAITING)):
                found = _make(recipe, stock, force, jobs, progress)
        except OSError as error:
            raise build.cache_error(error, root) from error
    if found is None or found.library is None:
        raise EngineBuildError("the engine was installed and is not found: run again with --force")
    return found


def copy_libraries(
    options: EngineOptions, directory: Path, *, narrate: Callable[[str], None]
) -> tuple[Path, Path]:
    """Build the patched and the stock library, copy them into ``directory``, and install neither.

    Returns their folders. Raises EngineBuildError.
    """
    recipe = Recipe.create(load_pin(), options)
    ours, stock = directory / "engine", directory / "stock"
    with exclusive(paths.engine_cache_dir() / "engine" / "lock"):
        build.check_space(recipe)
        wheel = build.cached_wheel(recipe.key)
        if wheel is None:
            narrate(f"building the engine {recipe.key}")
            wheel = build.build_wheel(recipe)
        library = build.cached_stock(recipe.stock_key)
        if library is None:
            narrate(f"building the stock library {recipe.stock_key}")
            library = build.build_stock(recipe)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(library, stock, symlinks=True)
        with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
            shutil.copytree(Path(unpacked) / "llama_cpp" / "lib", ours)
    return ours, stock


def make_wheel(
    target: str,
    directory: Path,
    *,
    backends: Sequence[str] = (),
    jobs: int | None = None,
    progress: ReportProgress = ignore,
) -> Path:
    """Build the engine for every processor of ``target`` and put its wheel into ``directory``; nothing is
    installed.

    Raises EngineBuildError.
    """
    recipe = Recipe.create(load_pin(), EngineOptions(tuple(sorted(set(backends) - {"cpu"})), target=target))
    with exclusive(paths.engine_cache_dir() / "engine" / "lock", on_wait=lambda: progress(_WAITING)):
        build.check_space(recipe)
        wheel = build.cached_wheel(recipe.key)
        if wheel is None:
            wheel = build.build_wheel(recipe, jobs=jobs, progress=progress)
        directory.mkdir(parents=True, exist_ok=True)
        return portable.check_wheel(wheel, target, directory)


def _is_ready(recipe: Recipe, found: Installed | None, stock: bool) -> bool:
    if found is None or found.library is None or not _fits(found, recipe) or missing_dependencies():
        return False
    return not stock or build.cached_stock(recipe.stock_key) is not None


def _fits(found: Installed, recipe: Recipe) -> bool:
    return found.options == recipe.options and found.is_made_from(recipe)


def _make(
    recipe: Recipe, stock: bool, force: bool, jobs: int | None, progress: ReportProgress
) -> Installed | None:
    if force:
        build.forget(recipe)
    found = installed_engine()  # again: what another build left, now that the lock is ours
    if force or not _is_ready(recipe, found, stock=False):
        wheel = build.cached_wheel(recipe.key)
        if wheel is None:
            build.check_space(recipe)
            wheel = build.build_wheel(recipe, jobs=jobs, progress=progress)
        install_wheel(wheel, progress=progress)
        found = installed_engine()
    if stock and (force or build.cached_stock(recipe.stock_key) is None):
        build.check_space(recipe)
        build.build_stock(recipe, jobs=jobs, progress=progress)
    return found


def stock_lib_dir() -> Path | None:
    """Library directory of the stock build that belongs to the installed engine; None if there is none.

    ``LLAMA_CPP_LIB_PATH`` set to it makes llama-cpp-python load the unpatched library.
    """
    found = installed_engine()
    if found and found.manifest:
        return build.cached_stock(found.manifest["stock_key"])
    return build.cached_stock(Recipe.create(load_pin(), EngineOptions.create()).stock_key)


def source_dir() -> Path | None:
    """The unpacked, unpatched source distribution in the cache; None if it was never fetched.

    llama.cpp, with its converter, is in ``vendor/llama.cpp`` below it.
    """
    directory = source.source_path(load_pin())
    return directory if directory.is_dir() else None


def engine_info() -> dict[str, Any]:
    """What is pinned, installed and cached, as JSON-ready values; nothing is built or imported."""
    pin = load_pin()
    directory = patchset.patches_dir()
    patches = [{"name": patch.name, "subject": patch.subject} for patch in patchset.read_series(directory)]
    found = installed_engine()
    abi, problem = _abi_version(found)
    stock = stock_lib_dir()
    return {
        "pin": {"package": pin.package, "version": pin.version, "sha256": pin.sha256,
                "llama_cpp_commit": pin.llama_cpp_commit},
        "version": pin.engine_version,
        "patches": patches,
        "abi_version": abi,
        "abi_version_expected": patchset.source_abi_version(directory),
        "installed": _describe(found),
        "problem": problem,
        "current": bool(found and found.is_made_from(Recipe.create(pin, found.options or EngineOptions()))),
        "library": str(found.library) if found and found.library else None,
        "stock": str(stock) if stock else None,
        "cache": str(paths.engine_cache_dir()),
        "cached": _cached(),
    }  # fmt: skip


def _describe(found: Installed | None) -> dict[str, Any] | None:
    if found is None:
        return None
    manifest = found.manifest or {}
    return {
        "version": found.version,
        "patched": found.manifest is not None,
        "key": found.key,
        "backends": manifest.get("backends"),
        "target": found.options.target if found.options else None,
        "instruction_sets": _compiled_for(found),
    }


def _compiled_for(found: Installed) -> str:
    """The instruction sets of the one processor that an engine was compiled for; "" if it was for many."""
    options = found.options
    if found.manifest is None or options is None or "-DGGML_NATIVE=OFF" in options.wheel_arguments():
        return ""
    return found.manifest["machine"].get("isa", "")


def build_problem() -> str:
    """Why an engine cannot be compiled on this machine; "" if it has the tools."""
    try:
        toolchain.find_toolchain()
    except EngineBuildError as error:
        return str(error)
    return ""


def _abi_version(found: Installed | None) -> tuple[int | None, str | None]:
    """(ABI version of the installed library, why it could not be asked)."""
    if found is None or found.manifest is None:
        return None, None
    if found.library is None:
        return None, f"{found.directory / 'lib'} holds no libllama: run `mobile-gguf engine build --force`"
    try:
        library = ctypes.CDLL(str(found.library))
    except OSError as error:
        return None, f"{found.library} does not load: {error}"
    function = getattr(library, "mobile_abi_version", None)
    return (int(function()) if function else None), None


def _cached() -> list[dict[str, Any]]:
    entries = []
    for path in sorted((paths.engine_cache_dir() / "engine").glob(f"*/{build.MANIFEST}")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entry = {"key": path.parent.name, "version": manifest["version"], "backends": manifest["backends"]}
        entries.append(entry | {"built": manifest["built"], "stock": path.parent.name.startswith("stock-")})
    return entries
