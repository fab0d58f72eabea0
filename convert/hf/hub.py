"""Checkpoints from the Hugging Face Hub: ``hf:org/repo``, into the Hugging Face cache."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from mobile_gguf.errors import ModelNotFoundError, UsageError
from mobile_gguf.hub.cache import find_snapshot
from mobile_gguf.hub.client import read_repository
from mobile_gguf.hub.download import fetch_files
from mobile_gguf.hub.explain import HubError, is_offline, offline_error
from mobile_gguf.hub.reference import Reference, is_reference, parse_reference
from mobile_gguf.hub.variants import RemoteFile
from mobile_gguf.progress import Progress

_SAFETENSORS, _BIN = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ("*.json", "README.md", "*.txt", "tokenizer.model", "*.tiktoken", "*.jinja")


def is_checkpoint_reference(text: str) -> bool:
    """True for a repository on the Hub, false for a GGUF in one and for everything else."""
    if not is_reference(text):
        return False
    reference = parse_reference(text)
    return not reference.file and not reference.quant


def repository_name(reference: str) -> str:
    """The last part of the repository's name, for naming files after it. Raises UsageError."""
    return _parsed(reference).name


def fetch_checkpoint(reference: str, *, with_code: bool, progress: Progress) -> Path:
    """Download what a conversion needs of ``hf:org/repo[@revision]`` and return its folder in the cache.

    What is in the cache already is not downloaded again, and a broken download goes on where it stopped.
    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub. with_code: also
    the repository's Python files. Without the Hub, what the cache has is used. Raises UsageError,
    ModelNotFoundError or MobileError, one line each.
    """
    parsed = _parsed(reference)
    cached = _cached(parsed)
    if is_offline():
        if cached is None:
            raise offline_error(parsed)
        return cached
    progress(f"asking the Hub for {parsed.repo}", 0.0)
    try:
        repository = read_repository(parsed, lambda text: progress(text, 0.0))
    except HubError:
        if cached is None:
            raise
        return cached
    top = [file for file in repository.files if "/" not in file.path]
    # not the same weights a second time in the older format
    for weights in (_SAFETENSORS, _BIN):
        if any(fnmatch(file.path, weights) for file in top):
            patterns = (*_SMALL_FILES, *(["*.py"] if with_code else []), weights)
            wanted = [file for file in top if any(fnmatch(file.path, pattern) for pattern in patterns)]
            return fetch_files(repository, wanted, f"downloading {parsed.repo}", progress)[0]
    raise ModelNotFoundError(_no_weights(parsed, repository.files))


def _parsed(text: str) -> Reference:
    reference = parse_reference(text)
    if reference.file or reference.quant:
        raise UsageError(f"{text} names a GGUF of a repository, no checkpoint: write hf:{reference.repo}")
    return reference


def _cached(reference: Reference) -> Path | None:
    snapshot = find_snapshot(reference)
    if snapshot is None or not any(any(snapshot.folder.glob(weights)) for weights in (_SAFETENSORS, _BIN)):
        return None
    return snapshot.folder


def _no_weights(reference: Reference, files: tuple[RemoteFile, ...]) -> str:
    if any(file.path.endswith(".gguf") for file in files):
        return f"{reference} holds GGUF files, no checkpoint: to convert one, write {reference}:QUANT"
    return f"{reference} holds no model*.safetensors and no pytorch_model*.bin"
