"""Removing models: what a removal would delete and free, and doing it. Nothing that others use is touched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.errors import ModelNotFoundError, UsageError
from mobile_gguf.files.atomic import disk_errors
from mobile_gguf.files.paths import models_dir

from .cache import PARTIAL_SUFFIX, Snapshot, find_snapshot, is_in_cache, repository_folder, snapshots
from .listing import pulled_models
from .pull import pulled_reference
from .reference import Reference, is_reference, parse_reference
from .resolve import DEMO, demo_file, local_models
from .variants import Variant, choose, models_among


@dataclass(frozen=True)
class Removal:
    """Files to delete for a model, and the bytes that this gives back; ``kept`` says what stays and why."""

    name: str
    files: tuple[Path, ...]
    freed_bytes: int
    kept: str = ""
    repo: str = ""  # of the Hub: empty folders and names of revisions that lead nowhere go too

    def execute(self) -> None:
        """Delete. Raises MobileError that names the file where the disk refuses."""
        for path in self.files:
            with disk_errors(path, remedy=""):
                path.unlink(missing_ok=True)
        if self.repo:
            _tidy(repository_folder(self.repo))


def plan_removal(name: str, *, everything: bool = False) -> Removal:
    """What ``rm NAME`` deletes: a name of ``list``, or a reference; ``everything``: all of a repository.

    Raises ModelNotFoundError, or UsageError where several models can be meant.
    """
    if is_reference(name):
        reference = parse_reference(name)
        return _whole_repository(reference) if everything else _of_cache(reference)
    if everything:
        raise UsageError(f"--all is for a repository of the Hub, hf:ORG/REPO, not {name}")
    return _of_models_dir(name)


def _of_models_dir(name: str) -> Removal:
    if name == DEMO:
        path = demo_file()
        if path is None:
            raise ModelNotFoundError("the demo model is not built: there is nothing to remove")
        return _files(name, [path])
    # what lies deeper may be linked in, and be another program's
    models = {path.stem: path for path in local_models() if path.parent == models_dir()}
    wanted = Path(name).expanduser()
    path = models.get(name) or models.get(name.removesuffix(".gguf"))
    if path is None and wanted.is_file():
        if is_in_cache(wanted):
            return _by_path(wanted)
        inside = wanted.resolve().parent == models_dir().resolve()
        path = models.get(wanted.stem) if inside else None
        if path is None:
            raise UsageError(
                f"{name} is a file of yours, neither in {models_dir()} nor in the Hugging Face cache: delete"
                " it by hand"
            )
    if path is None:
        raise ModelNotFoundError(f"no such model: {name} is not in {models_dir()}; see `mobile-gguf list`")
    head, separator, count = path.stem.rpartition("-of-")
    stem = head[: -len("-00001")]
    parts = path.parent.glob("*.gguf")
    files = [p for p in parts if p.name.startswith(f"{stem}-") and p.stem.endswith(f"-of-{count}")]
    return _files(path.stem, sorted(files) if separator and files else [path])


def _by_path(path: Path) -> Removal:
    for snapshot, variant, variants in pulled_models():
        if any(snapshot.folder / file.path == path.absolute() for file in variant.files):
            return _variant(snapshot, variant, str(pulled_reference(snapshot, variant, variants)))
    raise ModelNotFoundError(f"{path} is no model that `mobile-gguf list` shows")


def _of_cache(reference: Reference) -> Removal:
    snapshot = find_snapshot(reference)
    variants = snapshot.variants() if snapshot is not None else []
    if snapshot is None or not variants:
        partials = _partials(reference.repo)
        if partials and not reference.file and not reference.quant:
            return _files(str(reference), partials, repo=reference.repo)
        raise ModelNotFoundError(f"{reference} is not in the Hugging Face cache; see `mobile-gguf list`")
    models = models_among(variants) or variants
    if not reference.file and not reference.quant and len(models) > 1:
        names = ", ".join(str(pulled_reference(snapshot, model, variants)) for model in models)
        raise UsageError(f"{reference} has {len(models)} models here, name one, or give --all: {names}")
    try:
        variant, _ = choose(reference, variants)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"in the Hugging Face cache, {error}") from None
    return _variant(snapshot, variant, str(pulled_reference(snapshot, variant, variants)))


def _variant(snapshot: Snapshot, variant: Variant, name: str) -> Removal:
    pointers = [snapshot.folder / file.path for file in variant.files]
    elsewhere = _blobs(
        path
        for other in snapshots(snapshot.repo)
        for path in _all_files(other.folder)
        if path not in pointers
    )
    blobs = [blob for blob in dict.fromkeys(map(_blob_of, pointers)) if blob is not None]
    shared = [blob for blob in blobs if blob in elsewhere]
    removal = _files(
        name, [*pointers, *(blob for blob in blobs if blob not in elsewhere)], repo=snapshot.repo
    )
    if not shared:
        return removal
    kept = f"{len(shared)} of {len(pointers)} files stay: another revision or name in the cache uses them"
    return Removal(name, removal.files, removal.freed_bytes, kept, removal.repo)


def _whole_repository(reference: Reference) -> Removal:
    if reference.file or reference.quant or reference.revision:
        raise UsageError(f"--all removes a repository whole: write hf:{reference.repo}")
    folder = repository_folder(reference.repo)
    files = _all_files(folder)
    if not files:
        raise ModelNotFoundError(f"{reference} is not in the Hugging Face cache; see `mobile-gguf list`")
    return _files(str(reference), files, repo=reference.repo)


def _files(name: str, files: list[Path], repo: str = "") -> Removal:
    """A removal of these files; what a link or another name of a file leads to is not freed."""
    freed = 0
    for path in files:
        stat = path.lstat()
        if not path.is_symlink() and stat.st_nlink == 1:
            freed += stat.st_size
    return Removal(name, tuple(files), freed, repo=repo)


def _blobs(pointers: Iterable[Path]) -> set[Path]:
    return {blob for blob in map(_blob_of, pointers) if blob is not None}


def _blob_of(pointer: Path) -> Path | None:
    """The file in ``blobs`` that a snapshot's link leads to; None for a file that stands for itself.

    Only one step is followed: a blob may in turn be a link into the store that repositories share.
    """
    if not pointer.is_symlink():
        return None
    blob = Path(os.path.normpath(pointer.parent / os.readlink(pointer)))
    return blob if blob.parent.name == "blobs" and is_in_cache(blob.parent) else None


def _partials(repo: str) -> list[Path]:
    return sorted((repository_folder(repo) / "blobs").glob(f"*{PARTIAL_SUFFIX}"))


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _tidy(folder: Path) -> None:
    """Remove empty folders; of revisions without files also the names; all if nothing is left."""
    commits = set()
    for snapshot in sorted((folder / "snapshots").glob("*")):
        if _all_files(snapshot):
            commits.add(snapshot.name)
        _remove_empty(snapshot)
    if not commits and not _all_files(folder / "blobs"):
        for path in [*_all_files(folder / "refs"), *_all_files(folder / ".no_exist")]:
            path.unlink(missing_ok=True)
        for rest in (*_all_files(folder), *(folder.parent / ".locks" / folder.name).glob("*.lock")):
            if rest.suffix in (".lock", ".json"):
                rest.unlink(missing_ok=True)
    else:
        for path in _all_files(folder / "refs"):
            with contextlib.suppress(OSError):
                if path.read_text().strip() not in commits:
                    path.unlink()
    _remove_empty(folder)
    _remove_empty(folder.parent / ".locks" / folder.name)


def _remove_empty(folder: Path) -> None:
    for path in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
