"""Packs the kit: ``python -m mobile_gguf.bench.gpu_kit.pack``, or ``make gpu-kit``.

The archive has the patched sources of llama.cpp and those files of the stock ones that differ, this
package, the GPU's tests and their models, and the wheels that a machine with Python 3.12 and numpy lacks.
With ``--objects`` it also has CUDA objects that were compiled before.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.sizes import MIB, format_bytes
from mobile_gguf.vendor import patchset, source
from mobile_gguf.vendor.pin import load_pin

from .tests import MODELS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIMIT_BYTES = 60 * MIB
NAME = "gpu-kit"
# behind the package's own dependencies, and for its tests: pip fetches no more than is named
_BEHIND = (
    "markupsafe", "diskcache", "typing-extensions", "pyyaml", "tqdm", "requests", "urllib3", "idna",
    "certifi", "charset-normalizer", "pytest>=9", "iniconfig", "pluggy", "packaging", "pygments",
    "hypothesis>=6", "sortedcontainers",
)  # fmt: skip
# there, brought as source, for another Python, or for a network
_LEFT_OUT = ("numpy", "llama-cpp-python", "tomli", "huggingface-hub")
_PLATFORMS = (
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
_TESTS = ("tests/conftest.py", "tests/device/test_device_gpu.py")
# what those read: their machine has no Transformers to make them
TINY_MODELS = ("qwen3moe", "gpt-oss", "qwen3moe-q4_k", "qwen3moe-scales")
# of llama.cpp's sources, beside those that no build of ours reads
_NOT_COMPILED = ("scripts", "conversion", "gguf-py", "licenses")


def _project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def wheels_of(root: Path) -> list[str]:
    """What pip is to fetch: what the package depends on, and what is behind it."""
    own: list[str] = _project(root)["project"]["dependencies"]
    return [*(each for each in own if not each.startswith(_LEFT_OUT)), *_BEHIND]


def package_folders(root: Path) -> dict[str, Path]:
    """Every package of the project and its folder."""
    setuptools: dict[str, Any] = _project(root)["tool"]["setuptools"]
    mapped: dict[str, str] = setuptools["package-dir"]
    found = {}
    for package in setuptools["packages"]:
        known = max((name for name in mapped if f"{package}.".startswith(f"{name}.")), key=len)
        found[package] = root.joinpath(mapped[known], *package[len(known) :].split("."))
    return found


def copy_package(root: Path, target: Path) -> None:
    """The project as it would be installed, for importing."""
    for package, folder in package_folders(root).items():
        destination = target.joinpath(*package.split("."))
        destination.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_file():
                shutil.copy2(path, destination)


def copy_tests(root: Path, target: Path) -> None:
    """The GPU's tests with what they import."""
    supported = [path.relative_to(root) for path in (root / "tests" / "support").glob("*.py")]
    for relative in [*map(Path, _TESTS), *supported, Path("pyproject.toml")]:
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / relative, destination)


def copy_models(root: Path, target: Path) -> None:
    """The tests' tiny models, made if need be; raises UsageError with what the maker said."""
    target.mkdir(parents=True)
    support = root / "tests" / "support"
    done = subprocess.run(
        [sys.executable, str(support / "tiny_models.py"), str(target), *TINY_MODELS],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no word"]
        raise UsageError(f"the tests' models cannot be made: {said[-1]}")


def copy_sources(target: Path) -> None:
    """``engine``: the patched tree; ``upstream``: stock files where it differs; ``only-ours.json``."""
    original = source.unpacked_source(load_pin())
    series = patchset.patches_dir()
    source.copy_source(original, target / "engine")
    source.patch_tree(target / "engine", series)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        stock = Path(scratch) / "stock"
        source.copy_source(original, stock)
        source.apply_patches(stock, [patch for patch in patchset.read_series(series) if patch.is_fix])
        only_ours = write_difference(target / "engine", stock, target / "upstream")
    (target / "only-ours.json").write_text(json.dumps(only_ours, indent=1) + "\n", encoding="utf-8")
    for tree in ("engine", "upstream"):
        for name in _NOT_COMPILED:
            shutil.rmtree(target / tree / source.LLAMA_CPP / name, ignore_errors=True)


def write_difference(ours: Path, stock: Path, target: Path) -> list[str]:
    """Copy files of ``stock`` that ``ours`` has otherwise or not; returns those that only ``ours`` has."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(stock.rglob("*")):
        relative = path.relative_to(stock)
        if path.is_file() and not (
            (ours / relative).is_file() and filecmp.cmp(path, ours / relative, shallow=False)
        ):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / relative)
    files = [path.relative_to(ours) for path in sorted(ours.rglob("*")) if path.is_file()]
    return [relative.as_posix() for relative in files if not (stock / relative).is_file()]


def fetch_wheels(wheels: list[str], cache: Path, target: Path) -> None:
    """With pip from the configured index, once; raises UsageError with its words."""
    asked = cache / "asked.json"
    if not asked.is_file() or json.loads(asked.read_text(encoding="utf-8")) != wheels:
        shutil.rmtree(cache, ignore_errors=True)
        platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input",
             "--only-binary=:all:",
             "--disable-pip-version-check", "--python-version", "312", "--implementation", "cp", *platforms,
             "--dest", str(cache), *wheels],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise UsageError(f"the wheels cannot be had: {done.stderr.strip().splitlines()[-1]}")
        asked.write_text(json.dumps(wheels) + "\n", encoding="utf-8")
    target.mkdir(parents=True)
    for wheel in cache.glob("*.whl"):
        shutil.copy2(wheel, target)


def write_archive(folder: Path, archive: Path, limit: int = LIMIT_BYTES) -> int:
    """Pack; returns its bytes. Raises UsageError, and leaves no archive, if it is larger than ``limit``."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as stream:
        stream.add(folder, NAME)
    n_bytes = partial.stat().st_size
    if n_bytes > limit:
        partial.unlink()
        raise UsageError(
            f"the kit takes {format_bytes(n_bytes)}, and {format_bytes(limit)} may travel: "
            "give fewer --objects"
        )
    partial.replace(archive)
    return n_bytes


def pack(root: Path, archive: Path, objects: Path | None = None) -> int:
    """The whole kit; returns its bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        folder = Path(scratch) / NAME
        copy_package(root, folder / "package")
        copy_tests(root, folder / "project")
        copy_models(root, folder / "project" / MODELS)
        (folder / "sources").mkdir()
        copy_sources(folder / "sources")
        fetch_wheels(wheels_of(root), archive.parent / "gpu-kit-wheels", folder / "wheels")
        shutil.copy2(Path(__file__).with_name("start.py"), folder / "run.py")
        if objects is not None:
            shutil.copytree(objects, folder / "objects")
        return write_archive(folder, archive)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.gpu_kit.pack", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout")
    parser.add_argument("--archive", type=Path, default=Path("build") / f"{NAME}.tar.gz")
    parser.add_argument(
        "--objects",
        type=Path,
        help="CUDA objects of compile_once.py, with a file `architectures` such as '86 90'",
    )
    args = parser.parse_args(argv)
    try:
        n_bytes = pack(args.root.resolve(), args.archive.resolve(), args.objects)
    except MobileError as error:
        print(f"gpu-kit: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.archive}: {format_bytes(n_bytes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
