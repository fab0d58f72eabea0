"""Editing the patches: the patched source as a git tree with one commit per patch, and back to files.

``make_tree`` is how the patches are changed (edit, then amend or fix up the commit) and how they are moved to
another pin (it stops at the first patch that does not apply). ``patches/src`` is linked into the tree, so our
own sources are edited in place and are in no commit.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.errors import EngineBuildError

from . import patchset, source
from .pin import Pin

_BASE_TAG = "pin"
_NAME_TRAILER = "Patch-File: "
_STATE = Path(".git") / "mobile-patch"  # the patch whose rejected hunks are being placed by hand
_IDENTITY = (
    "-c",
    "user.name=mobile-gguf",
    "-c",
    "user.email=mobile-gguf@localhost",
    "-c",
    "commit.gpgsign=false",
)


@dataclass(frozen=True)
class TreeState:
    """Where ``make_tree`` or ``continue_tree`` got to."""

    applied: list[str]
    rejected: str | None = None  # name of the patch that did not apply
    rejects: tuple[str, ...] = ()  # its *.rej files


def make_tree(directory: Path, pin: Pin, patches: Path, *, narrate: source.Narrate = print) -> TreeState:
    """Unpack the pin into a new directory and commit the series onto it, up to the first that fails.

    Raises:
        EngineBuildError: the directory exists, git is missing, or the source cannot be fetched.
    """
    if directory.exists() and any(directory.iterdir()):
        raise EngineBuildError(f"{directory} is not empty: choose a new directory, or use --continue")
    stock = source.unpacked_source(pin, narrate=narrate)
    if directory.exists():
        directory.rmdir()
    source.copy_source(stock, directory)
    _git(directory, "init", "--quiet")
    _git(directory, "config", "core.autocrlf", "false")
    _git(directory, "add", "--all", "--force")
    _git(directory, "commit", "--quiet", "--message", f"{pin.package} {pin.version}")
    _git(directory, "tag", _BASE_TAG)
    (directory / ".git" / "info").mkdir(exist_ok=True)
    exclude = directory / ".git" / "info" / "exclude"
    exclude.write_text(f"/{source.SOURCES_IN_TREE.as_posix()}\n*.rej\n", encoding="utf-8")
    (directory / source.SOURCES_IN_TREE).symlink_to((patches / patchset.SOURCES).resolve())
    return _apply_rest(directory, patchset.read_series(patches))


def continue_tree(directory: Path, patches: Path) -> TreeState:
    """Commit the patch that was placed by hand and apply the ones behind it.

    Raises:
        EngineBuildError: the directory is not such a tree, or ``*.rej`` files are still there.
    """
    _check_tree(directory)
    series = patchset.read_series(patches)
    state = directory / _STATE
    if not state.exists():
        return _apply_rest(directory, _behind(directory, series))
    if rejects := _rejects(directory):
        raise EngineBuildError(
            f"{', '.join(rejects)} in {directory}: place these hunks by hand and delete the files"
        )
    name = state.read_text(encoding="utf-8")
    patch = next((patch for patch in series if patch.name == name), None)
    if patch is None:
        raise EngineBuildError(f"{name} is no longer in {patches / patchset.SERIES}: make a new tree")
    _commit(directory, patch)
    state.unlink()
    return _apply_rest(directory, _behind(directory, series))


def export_patches(directory: Path, patches: Path) -> list[str]:
    """Write the commits of a tree to ``patches/`` as a new series and return the file names.

    Raises:
        EngineBuildError: the tree has changes that are in no commit, or a patch is waiting to be placed.
    """
    _check_tree(directory)
    if (directory / _STATE).exists():
        raise EngineBuildError(f"a patch is waiting to be placed in {directory}: run tree --continue first")
    if changed := _git(directory, "status", "--porcelain").strip():
        first = changed.splitlines()[0].strip()
        raise EngineBuildError(f"{directory} has changes in no commit ({first}): commit or amend them first")
    files = {}
    commits = _git(directory, "rev-list", "--reverse", f"{_BASE_TAG}..HEAD").split()
    for number, commit in enumerate(commits, start=1):
        message = _git(directory, "log", "-1", "--format=%B", commit).strip()
        header, name = _split_message(message, number)
        difference = _git(
            directory,
            "diff",
            "--no-color",
            "--no-ext-diff",
            "--no-renames",
            "--abbrev=7",
            f"{commit}^",
            commit,
        )
        files[name] = f"Subject: {header}\n\n{difference}"
    return _write_series(patches, files)


def _write_series(patches: Path, files: dict[str, str]) -> list[str]:
    series = patches / patchset.SERIES
    comments = [line for line in series.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for patch in patchset.read_series(patches):
        if patch.name not in files:
            patch.path.unlink()
    for name, text in files.items():
        (patches / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    series.write_text("\n".join([*comments, *files]) + "\n", encoding="utf-8")
    return list(files)


def _split_message(message: str, number: int) -> tuple[str, str]:
    """(header of the patch, its file name); a commit made by hand gets a name from its subject."""
    lines = message.splitlines()
    names = [line.removeprefix(_NAME_TRAILER) for line in lines if line.startswith(_NAME_TRAILER)]
    header = "\n".join(line for line in lines if not line.startswith(_NAME_TRAILER)).strip()
    slug = re.sub(r"[^a-z0-9]+", "-", lines[0].lower()).strip("-")[:50]
    return header, names[0] if names else f"{number:04}-{slug}.patch"


def _apply_rest(directory: Path, patches: list[patchset.Patch]) -> TreeState:
    applied: list[str] = []
    for patch in patches:
        done, _ = source.apply_patch(directory, patch)
        if not done:
            # as many hunks as fit, and a .rej file beside each file for the others
            source.apply_patch(directory, patch, arguments=["--reject"])
            (directory / _STATE).write_text(patch.name, encoding="utf-8")
            return TreeState(applied, patch.name, tuple(_rejects(directory)))
        _commit(directory, patch)
        applied.append(patch.name)
    return TreeState(applied)


def _commit(directory: Path, patch: patchset.Patch) -> None:
    header = patch.header.strip().removeprefix("Subject: ")
    _git(directory, "add", "--all")
    _git(directory, "commit", "--quiet", "--allow-empty", "--cleanup=verbatim", "--message",
         f"{header}\n\n{_NAME_TRAILER}{patch.name}\n")  # fmt: skip


def _behind(directory: Path, series: list[patchset.Patch]) -> list[patchset.Patch]:
    messages = _git(directory, "log", "--format=%B", f"{_BASE_TAG}..HEAD")
    done = {
        line.removeprefix(_NAME_TRAILER) for line in messages.splitlines() if line.startswith(_NAME_TRAILER)
    }
    return [patch for patch in series if patch.name not in done]


def _rejects(directory: Path) -> list[str]:
    found = directory.rglob("*.rej")
    return sorted(str(path.relative_to(directory)) for path in found)


def _check_tree(directory: Path) -> None:
    if not (directory / ".git" / "refs" / "tags" / _BASE_TAG).exists():
        raise EngineBuildError(f"{directory} is not a tree of patches: make one with `tree {directory}`")


def _git(directory: Path, *arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        raise EngineBuildError("git was not found: install git")
    done = subprocess.run(
        [git, *_IDENTITY, *arguments], cwd=directory, env=source.git_environment(directory, os.environ),
        stdin=subprocess.DEVNULL, capture_output=True,
        encoding="utf-8", errors="surrogateescape", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise EngineBuildError(
            f"git {arguments[0]} failed in {directory}: {said[-1] if said else 'no output'}"
        )
    return done.stdout
