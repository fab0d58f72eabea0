"""The pinned source: fetched with pip, checked against its hash, unpacked, patched outside the work tree."""

import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mobile_gguf.errors import EngineBuildError
from mobile_gguf.files import paths
from mobile_gguf.files.lock import exclusive

from . import failures, patchset, process
from .pin import Pin

LLAMA_CPP = Path("vendor") / "llama.cpp"
SOURCES_IN_TREE = LLAMA_CPP / "mobile"  # where the patches' target_sources look for patches/src

# in the archive and in no build: 134 of the 179 MB that each tree would hold
_NOT_BUILT = frozenset(
    LLAMA_CPP / name
    for name in ("app", "benches", "docs", "examples", "media", "models", "pocs", "tests", "tools")
)

Narrate = Callable[[str], None]


def sdist_path(pin: Pin) -> Path:
    """Where the source distribution is cached."""
    return paths.engine_cache_dir() / "sdist" / pin.sdist


def fetch_sdist(pin: Pin, *, narrate: Narrate = lambda text: None) -> Path:
    """The cached source distribution, fetched with pip from the configured index if it is not there.

    Raises:
        EngineBuildError: no index can be reached, the hash differs, or the disk is full.
    """
    target = sdist_path(pin)
    if target.exists():
        check_hash(target, pin)
        return target
    narrate(f"fetching {pin.package} {pin.version} ({pin.size / 1e6:.0f} MB) from the package index")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="tmp-") as scratch:
        requirements = Path(scratch) / "requirements.txt"
        # with a hash in the file pip checks the archive before it runs any code from it
        requirements.write_text(
            f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8"
        )
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", pin.package, "--no-input",
            "--disable-pip-version-check", "--dest", scratch, "--requirement", str(requirements),
        ]  # fmt: skip
        log = paths.engine_cache_dir() / "logs" / "fetch.log"
        log.unlink(missing_ok=True)
        status, lines = process.run(command, log=log)
        fetched = Path(scratch) / pin.sdist
        if status != 0 or not fetched.exists():
            reason = failures.explain_pip(lines, log) + _by_hand(lines, target)
            raise EngineBuildError(f"cannot fetch {pin.package} {pin.version}: {reason}")
        check_hash(fetched, pin)
        os.replace(fetched, target)
    return target


def _by_hand(lines: Sequence[str], target: Path) -> str:
    return f" (or put {target.name} into {target.parent})" if failures.is_network(lines) else ""


def check_hash(path: Path, pin: Pin) -> None:
    """Compare a file with the pin.

    Raises:
        EngineBuildError: it is another file; the text has both hashes.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != pin.sha256:
        raise EngineBuildError(
            f"hash mismatch: {path} has sha256 {digest.hexdigest()}, the pin says {pin.sha256}: "
            f"delete the file and run again; if it comes back, do not trust your package index"
        )


def source_path(pin: Pin) -> Path:
    """Where the unpacked source is cached."""
    return paths.engine_cache_dir() / "src" / f"{pin.directory}-{pin.sha256[:8]}"


def unpacked_source(pin: Pin, *, narrate: Narrate = lambda text: None) -> Path:
    """The stock source tree in the cache; never change it. llama.cpp is in ``vendor/llama.cpp``."""
    target = source_path(pin)
    if target.exists():
        return target
    with exclusive(target.parent / "lock"):
        if not target.exists():
            sdist = fetch_sdist(pin, narrate=narrate)
            narrate(f"unpacking {sdist.name}")
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="tmp-") as scratch:
                _unpack(sdist, Path(scratch))
                os.replace(Path(scratch) / pin.directory, target)
    return target


def _unpack(sdist: Path, directory: Path) -> None:
    with tarfile.open(sdist) as archive:
        # upstream's history is half of the archive, and git would take vendor/llama.cpp for a submodule
        members = [member for member in archive if ".git" not in Path(member.name).parts]
        if hasattr(tarfile, "data_filter"):
            archive.extractall(directory, members=members, filter="data")
        else:  # Python 3.10.0 to 3.10.11; the hash has said that the archive is upstream's
            archive.extractall(directory, members=members)


def copy_source(source: Path, directory: Path) -> None:
    """Copy what a build needs of a source tree; times are kept."""

    def ignore(parent: str, names: list[str]) -> set[str]:
        relative = Path(parent).relative_to(source)
        return {name for name in names if relative / name in _NOT_BUILT}

    shutil.copytree(source, directory, ignore=ignore, symlinks=True)


def git_environment(directory: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment in which git sees ``directory`` and neither the user's settings nor a repository around it.

    Inside a repository ``git apply`` would silently skip every file outside the current directory.
    """
    clean = {name: value for name, value in environ.items() if not name.startswith("GIT_")}
    return {
        **clean,
        "GIT_CEILING_DIRECTORIES": str(directory.resolve().parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
    }


def apply_patch(tree: Path, patch: patchset.Patch, *, arguments: Sequence[str] = ()) -> tuple[bool, str]:
    """``git apply`` one patch to a tree: all without fuzz, or nothing. Returns (applied, git's words)."""
    git = shutil.which("git")
    if git is None:
        raise EngineBuildError("git was not found (it applies the patches): install git")
    command = [git, "apply", "--verbose", "--whitespace=nowarn", *arguments, str(patch.path.resolve())]
    return _run_git(command, tree)


def _run_git(command: Sequence[str], tree: Path) -> tuple[bool, str]:
    done = subprocess.run(
        command, cwd=tree, env=git_environment(tree), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    return done.returncode == 0, done.stdout


def patch_tree(tree: Path, patches: Path) -> None:
    """Apply the series to a stock tree and copy our sources into it. Raises EngineBuildError."""
    apply_patches(tree, patchset.read_series(patches))
    for name, path in patchset.read_sources(patches).items():
        destination = tree / SOURCES_IN_TREE / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)


def apply_patches(tree: Path, patches: Iterable[patchset.Patch]) -> None:
    """Apply patches to a tree, in order.

    Raises:
        EngineBuildError: a patch does not apply; the text ends in the three commands that re-export it.
    """
    for patch in patches:
        applied, said = apply_patch(tree, patch)
        if not applied:
            raise EngineBuildError(does_not_apply(patch, said))


def does_not_apply(patch: patchset.Patch, said: str) -> str:
    """One line: which patch, where, and the three commands that bring it up to date."""
    # "patch failed: FILE:LINE", or "FILE: No such file or directory"
    errors = re.findall(r"^error: (.*\S: ?\S.*)$", said, flags=re.MULTILINE)
    module = f"{Path(sys.executable).name} -m mobile_gguf.vendor"
    return (
        f"{patch.name} does not apply to the pinned source ({errors[0] if errors else 'git apply failed'}): "
        f"re-export the patches with (1) `{module} tree DIR`, edit what it names, "
        f"(2) `{module} tree DIR --continue`, (3) `{module} export DIR`"
    )


def sync_tree(fresh: Path, tree: Path) -> list[Path]:
    """Make ``tree`` hold what ``fresh`` holds and return the changed files, relative.

    Files that are equal are left alone with their times, changed ones get the time of now: a build in
    ``tree`` then compiles what changed and nothing else. ``fresh`` may lose files to ``tree``.
    """
    changed: list[Path] = []
    wanted: set[Path] = set()
    tree.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.rglob("*")):
        relative = path.relative_to(fresh)
        wanted.add(relative)
        target = tree / relative
        if path.is_dir() and not path.is_symlink():
            target.mkdir(parents=True, exist_ok=True)
        elif not (target.is_file() and _same(path, target)):
            # the time first: an interruption in between must not leave new content with an old time
            os.utime(path, follow_symlinks=False)
            os.replace(path, target)
            changed.append(relative)
    for target in sorted(tree.rglob("*"), reverse=True):
        relative = target.relative_to(tree)
        if relative not in wanted:
            changed.append(relative)
            target.rmdir() if target.is_dir() and not target.is_symlink() else target.unlink()
    return changed


def _same(path: Path, target: Path) -> bool:
    first, second = path.stat(), target.stat()
    if (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns):
        return True
    return first.st_size == second.st_size and filecmp.cmp(path, target, shallow=False)
