"""Asking the Hub: what a repository holds, and bytes of its files. Built on huggingface_hub's session,
which brings the token, proxies and certificates; the errors are those of ``explain.py``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import sleep
from typing import Any, TypeVar

from mobile_gguf.errors import ModelNotFoundError, UsageError

from .explain import (
    HubError,
    endpoint,
    explained,
    is_offline,
    is_worth_a_retry,
    offline_error,
    retry_after,
    status_of,
)
from .reference import Reference
from .variants import RemoteFile

Result = TypeVar("Result")
# called with a sentence when something takes longer than it should
Narrator = Callable[[str], None]
ATTEMPTS = 5  # of a download, in a row without a byte
QUESTION_ATTEMPTS = 3
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Repository:
    """A revision of a repository: its commit and all its files."""

    reference: Reference
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def has_checkpoint(self) -> bool:
        return any(file.path.endswith(".safetensors") for file in self.files)


def require_client(reference: Reference) -> None:
    """Raise UsageError without huggingface_hub, ModelNotFoundError in offline mode."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(f"{reference} needs huggingface_hub: pip install 'huggingface-hub>=1,<3'")
    if is_offline():
        raise offline_error(reference)


def read_repository(reference: Reference, narrate: Narrator | None = None) -> Repository:
    """What a repository holds. Raises UsageError, ModelNotFoundError or HubError, one line each."""
    require_client(reference)
    from huggingface_hub import HfApi

    def ask() -> Repository:
        api = HfApi(endpoint=endpoint())
        info = api.model_info(
            reference.repo, revision=reference.revision or None, files_metadata=True, timeout=timeout()
        )
        files = tuple(_file(sibling) for sibling in info.siblings or ())
        return Repository(reference, str(info.sha), files)

    with explained(reference):
        return retrying(ask, narrate or _silent)


@contextmanager
def open_range(repository: Repository, file: RemoteFile, start: int, stop: int) -> Iterator[tuple[Any, bool]]:
    """Ask for bytes ``start`` to ``stop`` of a file: the response, streamed, and whether it is that range.

    A server that ignores ranges sends the file from its beginning. Raises errors of huggingface_hub and its
    HTTP client as they are.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repository.reference.repo, file.path, revision=repository.commit, endpoint=endpoint())
    headers = build_hf_headers(library_name="mobile-gguf")
    # offsets are of the file, not of a compressed transfer of it
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    session = get_session()
    with session.stream("GET", url, headers=headers, timeout=timeout(), follow_redirects=True) as response:
        hf_raise_for_status(response)
        yield response, response.status_code == 206


def retrying(action: Callable[[], Result], narrate: Narrator) -> Result:
    """Ask for something that may fail for a moment, up to QUESTION_ATTEMPTS times."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except Exception as error:
            if attempt == QUESTION_ATTEMPTS or not is_worth_a_retry(error):
                raise
            pause_before_retry(error, attempt, narrate)


def pause_before_retry(error: Exception, attempt: int, narrate: Narrator) -> None:
    """Wait as the Hub asks, else 1, 2, 4, 8 s. Raises ``error`` if the Hub asks for more than a minute."""
    asked = retry_after(error)
    if asked is not None and asked > LONGEST_WAIT_S:
        raise error
    seconds = asked if asked is not None else float(2 ** (attempt - 1))
    status = status_of(error)
    why = f"the Hub answered with HTTP {status}" if status else "the connection broke"
    narrate(f"{why}: trying again in {seconds:.0f} s")
    sleep(seconds)


def timeout() -> float:
    """Seconds without a byte after which a connection counts as broken: ``$HF_HUB_DOWNLOAD_TIMEOUT``."""
    try:
        return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")) or 10.0
    except ValueError:
        return 10.0


def _file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    if lfs is not None:
        return RemoteFile(sibling.rfilename, int(lfs.size), str(lfs.sha256))
    return RemoteFile(sibling.rfilename, int(sibling.size or 0), str(sibling.blob_id or ""))


def no_model(repository: Repository) -> ModelNotFoundError:
    """For a repository without a GGUF: what it holds instead, and what can be done with that."""
    reference = Reference(repository.reference.repo, revision=repository.reference.revision)
    if repository.has_checkpoint:
        return ModelNotFoundError(
            f"{reference} holds a checkpoint (safetensors) and no GGUF: `mobile-gguf convert {reference}`"
            " makes one of it, or look for a repository that has GGUF in its name"
        )
    return ModelNotFoundError(f"{reference} holds no GGUF file: see {endpoint()}/{reference.repo}")


def _silent(_text: str) -> None:
    return


__all__ = ["HubError", "Repository", "open_range", "read_repository", "retrying"]
