"""Building: the patched wheel with ``pip wheel``, the stock library with cmake, both into the cache."""

import errno
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.files import paths

from . import failures, patchset, portable, process, source, toolchain
from .progress import Progress, ReportProgress, ignore, parse_line
from .recipe import Recipe
from .toolchain import Toolchain

MANIFEST = "engine.json"
MARKER = "_mobile_engine.json"  # the same, inside the installed llama_cpp package

# source, objects and wheel of one build, with room to spare; device backends compile every kernel many times
_BYTES_NEEDED = 700 * 10**6
_BYTES_NEEDED_DEVICE = 5 * 10**9

# upstream's install rules for C++ developers: a second copy of every library outside the package
_WHEEL_EXCLUDE = ("/bin/**", "/include/**", "/lib/**", "/lib64/**", "/share/**")

# what scikit-build-core says at the start of a stage
_STAGES = {"*** Configuring CMake": "configuring", "*** Installing project": "packing"}


def engine_dir(key: str) -> Path:
    """Cache entry of a patched engine."""
    return paths.engine_cache_dir() / "engine" / key


def stock_dir(stock_key: str) -> Path:
    """Cache entry of an unpatched library."""
    return paths.engine_cache_dir() / "engine" / f"stock-{stock_key}"


def cached_wheel(key: str) -> Path | None:
    """The wheel of a key, None if it was never built."""
    return next(iter(sorted(engine_dir(key).glob("*.whl"))), None)


def cached_stock(stock_key: str) -> Path | None:
    """Library directory of a stock build, None if it was never built."""
    directory = stock_dir(stock_key) / "lib"
    return directory if directory.is_dir() else None


def default_jobs() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_wheel(
    recipe: Recipe,
    *,
    patches: Path | None = None,
    jobs: int | None = None,
    progress: ReportProgress = ignore,
) -> Path:
    """Build the patched wheel into the cache and return its path.

    Objects of an earlier build with the same options are used again, so that a changed source costs
    the time of its own compilation. The caller holds the lock.

    Raises:
        EngineBuildError: a tool is missing, the source cannot be had or patched, or it does not compile.
    """
    tools = _check_tools(recipe)
    # cmake refuses a directory that another generator has used
    work = _build_dir(recipe) / Path(tools.make).stem
    log = _new_log(f"engine-{recipe.key}")
    with _cache_errors(work):
        stock = source.unpacked_source(recipe.pin, narrate=lambda text: progress(Progress(text)))
        progress(Progress(f"applying {len(recipe.patches)} patches"))
        tree = work / "tree"
        with _scratch(work) as scratch:
            fresh = scratch / "tree"
            source.copy_source(stock, fresh)
            directory = patches or patchset.patches_dir()
            source.patch_tree(fresh, directory)
            _check_unchanged(recipe, directory)
            _write_json(fresh / "llama_cpp" / MARKER, recipe.manifest())
            source.sync_tree(fresh, tree)
        with _scratch(engine_dir(recipe.key).parent) as scratch:
            started = time.monotonic()
            entry = scratch / "entry"
            entry.mkdir()
            _pip_wheel(recipe, tools, tree, entry, log, jobs or default_jobs(), progress)
            wheels = list(entry.glob("*.whl"))
            if len(wheels) != 1 or f"-{recipe.pin.engine_version}-" not in wheels[0].name:
                built = ", ".join(wheel.name for wheel in wheels) or "nothing"
                raise EngineBuildError(
                    f"pip wheel made {built} where version {recipe.pin.engine_version} was expected: "
                    f"patch 0001 and vendor/pin.json must name the same version; log: {log}"
                )
            _publish(recipe, entry, engine_dir(recipe.key), started)
    wheel = cached_wheel(recipe.key)
    assert wheel is not None  # published above, under the lock
    return wheel


def build_stock(
    recipe: Recipe,
    *,
    patches: Path | None = None,
    jobs: int | None = None,
    progress: ReportProgress = ignore,
) -> Path:
    """Build llama.cpp with the same options and none of our hooks, and return its library directory.

    Patches that are fixes (``Patch.is_fix``) go in as well.

    Raises:
        EngineBuildError: as for ``build_wheel``.
    """
    tools = _check_tools(recipe)
    log = _new_log(f"stock-{recipe.stock_key}")
    root = engine_dir("").parent
    with _cache_errors(root), _scratch(root) as scratch:
        stock = source.unpacked_source(recipe.pin, narrate=lambda text: progress(Progress(text)))
        objects, tree = scratch / "objects", scratch / "tree"
        directory = patches or patchset.patches_dir()
        source.copy_source(stock, tree)
        source.apply_patches(tree, [patch for patch in patchset.read_series(directory) if patch.is_fix])
        _check_unchanged(recipe, directory)
        environ = _build_environment(recipe, tools, tree)
        configure = [
            tools.cmake, "-S", str(tree / source.LLAMA_CPP), "-B", str(objects), "-G", tools.generator,
            *recipe.options.stock_arguments(),
        ]  # fmt: skip
        parallel = str(jobs or default_jobs())
        compile_ = [tools.cmake, "--build", str(objects), "--target", "llama", "--parallel", parallel]
        started = time.monotonic()
        for stage, command in (("configuring", configure), ("compiling", compile_)):
            progress(Progress(f"{stage} stock llama.cpp"))
            status, lines = process.run(command, log=log, env=environ, on_line=_reporter(progress))
            if status != 0:
                _note_errors(lines, progress)
                reason = failures.explain_build(lines, log)
                raise EngineBuildError(f"{stage} stock llama.cpp failed: {reason}")
        entry = scratch / "entry"
        _copy_libraries(objects / "bin", entry / "lib")
        _publish(recipe, entry, stock_dir(recipe.stock_key), started)
    return stock_dir(recipe.stock_key) / "lib"


def _build_dir(recipe: Recipe) -> Path:
    return paths.engine_cache_dir() / "build" / recipe.build_key


def forget(recipe: Recipe) -> None:
    """Drop what a forced build must not use again: objects, unpacked source and the built engine."""
    unpacked = source.source_path(recipe.pin)
    for path in (_build_dir(recipe), unpacked, engine_dir(recipe.key)):
        shutil.rmtree(path, ignore_errors=True)


def _check_unchanged(recipe: Recipe, patches: Path) -> None:
    # the key was made before the files were copied: an edit in between would be cached under a wrong key
    now = Recipe.create(recipe.pin, recipe.options, patches=patches)
    if (now.patches, now.sources) != (recipe.patches, recipe.sources):
        raise EngineBuildError(f"{patches} changed while the build started: run again")


def _check_tools(recipe: Recipe) -> Toolchain:
    if target := recipe.options.target:
        tools = toolchain.find_toolchain(os.environ | portable.environment(target))
    else:
        tools = toolchain.find_toolchain()
    for backend in recipe.options.backends:
        toolchain.check_backend(backend)
    if target and "vulkan" in recipe.options.backends:
        portable.write_vulkan(target)
    return tools


def _pip_wheel(
    recipe: Recipe, tools: Toolchain, tree: Path, out: Path, log: Path, jobs: int, progress: ReportProgress
) -> None:
    environ = _build_environment(recipe, tools, tree) | {
        "CMAKE_ARGS": shlex.join(recipe.options.wheel_arguments()),
        "CMAKE_GENERATOR": tools.generator,
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "SKBUILD_BUILD_DIR": str(tree.parent / "cmake"),
        "SKBUILD_WHEEL_EXCLUDE": ";".join(_WHEEL_EXCLUDE),
    }
    if recipe.options.target:
        environ["SKBUILD_INSTALL_STRIP"] = (
            "false"  # the linker did; this machine's strip may know no such files
        )
        if recipe.options.backends:
            # two wheels of one version in a folder: the one that can do more is preferred
            environ["SKBUILD_WHEEL_BUILD_TAG"] = "1" + "".join(recipe.options.backends)
    command = [
        sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-input", "--no-cache-dir",
        "--disable-pip-version-check", "--wheel-dir", str(out), str(tree),
    ]  # fmt: skip
    progress(Progress("preparing"))
    status, lines = process.run(command, log=log, env=environ, on_line=_reporter(progress))
    if status != 0:
        _note_errors(lines, progress)
        raise EngineBuildError(f"building the engine failed: {failures.explain_build(lines, log)}")


def _build_environment(recipe: Recipe, tools: Toolchain, tree: Path) -> dict[str, str]:
    # named, because cmake and scikit-build-core would each choose by rules of their own, and the stock
    # library is compared bit for bit
    compilers = {"CC": tools.c_compiler, "CXX": tools.cxx_compiler} if tools.cxx_compiler else {}
    environ = compilers | source.git_environment(tree) | {"PATH": toolchain.search_path()}
    if target := recipe.options.target:
        environ |= portable.environment(target)
    if "cuda" in recipe.options.backends:
        environ["CUDACXX"] = toolchain.cuda_compiler()
    return environ


def _note_errors(lines: list[str], progress: ReportProgress) -> None:
    for error in failures.compiler_errors(lines):
        progress(Progress(error, is_note=True))


def _reporter(progress: ReportProgress) -> Callable[[str], None]:
    def report(line: str) -> None:
        if step := parse_line(line):
            progress(step)
            return
        for text, stage in _STAGES.items():
            if text in line:
                progress(Progress(stage))

    return report


def _copy_libraries(built: Path, destination: Path) -> None:
    destination.mkdir(parents=True)
    for path in sorted(built.iterdir()):
        if ".so" in path.name or path.suffix in {".dylib", ".dll"}:
            shutil.copy2(path, destination / path.name, follow_symlinks=False)


def _publish(recipe: Recipe, entry: Path, target: Path, started: float) -> None:
    built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    seconds = round(time.monotonic() - started)
    _write_json(entry / MANIFEST, recipe.manifest() | {"built": built, "seconds": seconds})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(entry, target)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _new_log(name: str) -> Path:
    log = paths.engine_cache_dir() / "logs" / f"{name}.log"
    log.unlink(missing_ok=True)
    return log


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary directory on the same file system, so that renaming out of it is atomic."""
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob("tmp-*"):  # of a killed build: the caller holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="tmp-") as name:
        yield Path(name)


@contextmanager
def _cache_errors(directory: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a line for the user."""
    try:
        yield
    except OSError as error:
        raise cache_error(error, directory) from error


def cache_error(error: OSError, directory: Path) -> EngineBuildError:
    """The line for an operating system error below ``directory``."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return EngineBuildError(failures.disk_full(directory))
    where = error.filename or directory
    return EngineBuildError(
        f"cannot use {where} ({error.strerror}): point XDG_CACHE_HOME to a directory that can be written"
    )


def check_space(recipe: Recipe) -> None:
    """Refuse a build that the disk cannot hold.

    Raises:
        EngineBuildError: less is free than a build takes.
    """
    needed = _BYTES_NEEDED_DEVICE if recipe.options.backends else _BYTES_NEEDED
    root = paths.engine_cache_dir()
    existing = next(parent for parent in (root, *root.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise EngineBuildError(
            f"the disk of {root} has {free / 1e9:.1f} GB free and a build takes {needed / 1e9:.1f} GB: "
            f"free some, or point XDG_CACHE_HOME to another disk"
        )
