"""Files from the Hub into the Hugging Face cache: resumed, verified, complete or absent.

huggingface_hub's own download (2.4) starts anew in every process and checks sizes only; a model of many
gigabytes over a home line needs both. The bytes come by its session, and they lie where it looks for them:
``blobs/ETAG``, until then ``blobs/ETAG.incomplete``, under its locks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import replace_file
from mobile_gguf.files.lock import exclusive
from mobile_gguf.progress import Progress
from mobile_gguf.sizes import GIB, MIB, format_bytes

from .cache import PARTIAL_SUFFIX, cache_root, repository_folder, write_ref
from .client import ATTEMPTS, Repository, open_range, pause_before_retry
from .explain import HubError, cache_disk_errors, explained, is_worth_a_retry
from .meter import Meter
from .variants import RemoteFile

# Content delivery networks refuse answers above 50 GB, ranges of such a file they send.
_SEGMENT = 8 * GIB
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class DamagedError(HubError):
    """What came is not what the Hub has."""


def fetch_files(
    repository: Repository, files: Iterable[RemoteFile], name: str, progress: Progress
) -> tuple[Path, int]:
    """Bring files of a repository into the cache; returns the snapshot's folder and the bytes received.

    What is there is not fetched again, and what a stopped run left is gone on with. Each file is checked
    against the Hub's size and hash before it gets its name. ``name`` is shown with the progress. Raises
    MobileError, one line; Ctrl-C leaves what has come for the next run.
    """
    wanted = list(files)
    for file in wanted:
        _check_names(repository, file)
    folder = repository_folder(repository.reference.repo)
    snapshot = folder / "snapshots" / repository.commit
    meter = Meter(name, sum(file.n_bytes for file in wanted), progress)
    with cache_disk_errors(folder), explained(repository.reference):
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        _check_disk(folder, snapshot, wanted)
        for file in wanted:
            _fetch(repository, file, folder, snapshot / file.path, meter)
        write_ref(repository.reference.repo, repository.reference.wanted_revision, repository.commit)
    return snapshot, meter.received


def _check_names(repository: Repository, file: RemoteFile) -> None:
    """A name of the Hub becomes a path here, and so does a hash."""
    parts = file.path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in file.path or not file.path.isprintable():
        raise HubError(
            f"{repository.reference}: the Hub names a file {file.path!r}, which cannot be one here"
        )
    if not _ETAG.fullmatch(file.etag) or not re.fullmatch(r"[0-9a-f]{40}", repository.commit):
        raise HubError(
            f"{repository.reference}: the Hub gives no hash for {file.path}: it cannot be verified"
        )


def _check_disk(folder: Path, snapshot: Path, files: list[RemoteFile]) -> None:
    missing = sum(_missing_bytes(folder, file) for file in files if not _is_there(snapshot / file.path, file))
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise MobileError(
            f"not enough space for {format_bytes(missing)} more in {cache_root()}: its disk has"
            f" {format_bytes(free)} free; free some there (see `mobile-gguf list` and `mobile-gguf rm`), or"
            " set HF_HOME to another disk"
        )


def _missing_bytes(folder: Path, file: RemoteFile) -> int:
    blob = folder / "blobs" / file.etag
    if _is_there(blob, file):
        return 0
    partial = _partial(blob)
    return max(0, file.n_bytes - (partial.stat().st_size if partial.is_file() else 0))


def _is_there(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.n_bytes


def _partial(blob: Path) -> Path:
    return blob.with_name(blob.name + PARTIAL_SUFFIX)


def _fetch(repository: Repository, file: RemoteFile, folder: Path, pointer: Path, meter: Meter) -> None:
    if _is_there(pointer, file):
        meter.skip(file.n_bytes)
        return
    blob = folder / "blobs" / file.etag
    # the lock that huggingface_hub uses for this file
    lock = folder.parent / ".locks" / folder.name / f"{file.etag}.lock"

    def on_wait() -> None:
        meter.say(f"waiting for another process that downloads {file.path}")

    with exclusive(lock, on_wait=on_wait):
        if _is_there(blob, file):
            meter.skip(file.n_bytes)
        elif not _is_there(pointer, file):  # another process may have been first
            _fetch_blob(repository, file, blob, meter)
        if not _is_there(pointer, file):
            _link(blob, pointer)


def _fetch_blob(repository: Repository, file: RemoteFile, blob: Path, meter: Meter) -> None:
    partial = _partial(blob)
    before = meter.done
    while True:
        with _open_partial(partial) as out:
            n_resumed, digest = _receive(repository, file, out, meter)
            if digest == file.etag:
                os.fsync(out.fileno())
        # closed, since Windows neither renames nor removes what is open
        if digest == file.etag:
            replace_file(partial, blob)
            return
        # before the lock goes: afterwards the name may be another process's
        partial.unlink()
        if not n_resumed:
            raise DamagedError(
                f"{repository.reference}: what came of {file.path} is not what the Hub has (hash"
                f" {digest[:12]}, not {file.etag[:12]}): it was removed; pull again, and if that"
                " does not help the file is damaged on the Hub or on the way"
            )
        meter.say("the start, from an earlier run, is damaged: fetching it again")
        meter.skip(before - meter.done)


def _open_partial(partial: Path) -> BinaryIO:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    # what stands under the name must be a file of ours, not a link to somewhere
    return os.fdopen(os.open(partial, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+b", buffering=0)


def _receive(repository: Repository, file: RemoteFile, out: BinaryIO, meter: Meter) -> tuple[int, str]:
    """Fetch what is missing of a file; returns how many of its bytes were there, and the hash of all."""
    position = out.seek(0, os.SEEK_END)
    if position > file.n_bytes:
        position = out.truncate(0)
    if position:
        meter.say("checking what an earlier run left")
    n_resumed = position
    hasher = _hasher(file)
    out.seek(0)
    while chunk := out.read(4 * MIB):
        hasher.update(chunk)
    meter.skip(position)
    attempt = 0
    while position < file.n_bytes:
        start = position
        stop = min(position + _SEGMENT, file.n_bytes)
        try:
            with open_range(repository, file, start, stop) as (response, is_range):
                if not is_range:  # the whole file, from its beginning
                    meter.skip(-position)
                    position = n_resumed = out.seek(out.truncate(0))
                    hasher = _hasher(file)
                    stop = file.n_bytes
                elif _first_byte(response) != position:
                    raise DamagedError(
                        f"{repository.reference}: the Hub sends another part than was asked for"
                    )
                for chunk in response.iter_bytes():
                    if position + len(chunk) > stop:
                        raise DamagedError(f"{repository.reference}: {file.path} is longer than the Hub says")
                    _write(out, chunk)
                    hasher.update(chunk)
                    position += len(chunk)
                    meter.add(len(chunk))
            if position == start:
                raise DamagedError(f"{repository.reference}: the Hub sends nothing of {file.path}")
        except Exception as error:
            attempt = 1 if position > start else attempt + 1
            if attempt >= ATTEMPTS or not is_worth_a_retry(error):
                raise
            pause_before_retry(error, attempt, meter.say)
    return n_resumed, hasher.hexdigest()


def _first_byte(response: Any) -> int:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def _write(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _hasher(file: RemoteFile) -> Any:
    """For the hash by which the Hub knows a file: sha256 of what LFS stores, git's sha1 of the others."""
    if file.has_sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.n_bytes, usedforsecurity=False)


def _link(blob: Path, pointer: Path) -> None:
    """Give a blob its name; where links cannot be made the blob moves there, as huggingface_hub does."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    partial = pointer.with_name(f"{pointer.name}.{os.getpid()}.tmp")
    try:
        os.symlink(os.path.relpath(blob, pointer.parent), partial)
        replace_file(partial, pointer)
    except OSError:
        partial.unlink(missing_ok=True)
        replace_file(blob, pointer)
