"""The Hugging Face cache on disk, read without huggingface_hub: where it is, what of a repository is there.

The layout is documented (https://huggingface.co/docs/huggingface_hub/guides/manage-cache):
``models--org--repo/`` holds ``refs/REVISION`` (a file with a commit), ``blobs/ETAG`` (contents) and
``snapshots/COMMIT/PATH`` (links to blobs, or the files themselves where links are not possible).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.files.atomic import replace_file

from .reference import Reference
from .variants import RemoteFile, Variant, find_variants

_COMMIT = re.compile(r"[0-9a-f]{40}")
PARTIAL_SUFFIX = ".incomplete"


def cache_root() -> Path:
    """``$HF_HUB_CACHE``, else ``$HF_HOME/hub``, else ``~/.cache/huggingface/hub``; read at each call."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    if value := os.environ.get("HF_HOME"):
        return Path(value).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"


def is_in_cache(path: Path) -> bool:
    """Whether a file lies in the cache, which other programs share: it is not to be changed there."""
    root = cache_root()
    return path.absolute().is_relative_to(root.absolute()) or path.resolve().is_relative_to(root.resolve())


def repository_folder(repo: str) -> Path:
    """Where a model repository lies in the cache, whether or not it does."""
    return cache_root() / f"models--{repo.replace('/', '--')}"


@dataclass(frozen=True)
class Snapshot:
    """One revision of a repository in the cache: its folder, and the names (``main``) that lead to it."""

    repo: str
    commit: str
    folder: Path
    refs: tuple[str, ...]

    def variants(self) -> list[Variant]:
        """The GGUF models that are there; a link to nothing is left out."""
        files = []
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() == ".gguf" and path.is_file():
                files.append(RemoteFile(path.relative_to(self.folder).as_posix(), path.stat().st_size))
        return find_variants(files)

    def reference(self, variant: Variant, *, alone: bool) -> Reference:
        """The shortest reference to a variant; ``alone``: no other here has its tag."""
        revision = "" if "main" in self.refs else (self.refs[0] if self.refs else self.commit)
        bare = Reference(self.repo, revision=revision)
        return bare.of_quant(variant.quant) if variant.quant and alone else bare.of_file(variant.path)


def snapshots(repo: str) -> list[Snapshot]:
    """Every revision of a repository in the cache."""
    folder = repository_folder(repo)
    names = _refs(folder)
    found = []
    for place in _folders(folder / "snapshots"):
        refs = tuple(sorted(name for name, commit in names.items() if commit == place.name))
        found.append(Snapshot(repo, place.name, place, refs))
    return found


def find_snapshot(reference: Reference) -> Snapshot | None:
    """The cached revision that a reference means."""
    wanted = reference.wanted_revision
    for snapshot in snapshots(reference.repo):
        if wanted in snapshot.refs or (len(wanted) >= 7 and snapshot.commit.startswith(wanted)):
            return snapshot
    return None


def repositories() -> list[str]:
    """Every model repository in the cache, by name."""
    found = []
    for folder in _folders(cache_root()):
        kind, _, name = folder.name.partition("--")
        if kind == "models" and "--" in name:
            found.append(name.replace("--", "/", 1))
    return found


def all_snapshots() -> Iterator[Snapshot]:
    """Every revision of every model repository in the cache."""
    for repo in repositories():
        yield from snapshots(repo)


def write_ref(repo: str, revision: str, commit: str) -> None:
    """Let a revision's name lead to a commit."""
    if _COMMIT.fullmatch(revision):
        return
    path = repository_folder(repo) / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(commit)
    replace_file(partial, path)


def _refs(folder: Path) -> dict[str, str]:
    """Names of revisions and their commits; a name may have slashes (``refs/pr/1``)."""
    found = {}
    refs = folder / "refs"
    for path in refs.rglob("*") if refs.is_dir() else ():
        if path.is_file() and not path.name.endswith(".tmp"):
            try:
                found[path.relative_to(refs).as_posix()] = path.read_text().strip()
            except (OSError, UnicodeDecodeError):
                continue
    return found


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
