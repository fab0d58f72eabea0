"""``pull``: the model a reference means, from the Hub into the cache; and where a pulled one lies."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import ModelNotFoundError
from mobile_gguf.progress import Progress, no_progress

from .cache import Snapshot, find_snapshot
from .client import Repository, no_model, read_repository
from .download import fetch_files
from .explain import is_offline, offline_error
from .reference import Reference
from .variants import Variant, choose, find_variants, models_among

logger = logging.getLogger("mobile_gguf")


@dataclass(frozen=True)
class Pulled:
    """A pulled model: its (first) file, and what it took."""

    reference: Reference
    path: Path
    files: tuple[Path, ...]
    quant: str
    commit: str
    n_bytes: int
    received_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The object that ``pull --json`` prints."""
        return {
            "model": str(self.reference),
            "repo": self.reference.repo,
            "quantization": self.quant or None,
            "commit": self.commit,
            "path": str(self.path),
            "files": [str(path) for path in self.files],
            "bytes": self.n_bytes,
            "received_bytes": self.received_bytes,
            "seconds": round(self.seconds, 3),
        }


def pull(reference: Reference, progress: Progress | None = None) -> Pulled:
    """Fetch a model, or what is missing of it, at the revision that the Hub has now.

    Without a quantisation Q4_K_M is taken, or what is nearest; a warning of the logger ``mobile_gguf`` says
    so. Raises UsageError, ModelNotFoundError, HubError or MobileError, one line each.
    """
    tell = progress or no_progress
    repository, variant = find_remote(reference, tell)
    started = time.monotonic()
    name = f"pulling {reference.name}" + (f" {variant.quant}" if variant.quant else "")
    snapshot, received = fetch_files(repository, variant.files, name, tell)
    return Pulled(
        reference=_exact(reference, variant),
        path=snapshot / variant.path,
        files=tuple(snapshot / file.path for file in variant.files),
        quant=variant.quant,
        commit=repository.commit,
        n_bytes=variant.n_bytes,
        received_bytes=received,
        seconds=time.monotonic() - started,
    )


def find_remote(reference: Reference, progress: Progress) -> tuple[Repository, Variant]:
    """The repository as the Hub has it, and the model in it that a reference means."""
    progress(f"asking the Hub for {reference.repo}", 0.0)
    repository = read_repository(reference, lambda text: progress(text, 0.0))
    variants = find_variants(repository.files)
    if not variants or not (reference.file or models_among(variants)):
        raise no_model(repository)
    variant, note = choose(reference, variants)
    if not variant.is_complete:
        raise ModelNotFoundError(
            f"{reference}: {variant.path} is one of {variant.n_parts} parts, and the repository has only"
            f" {len(variant.files)} of them"
        )
    if note:
        logger.warning(note)
    return repository, variant


def find_pulled(reference: Reference) -> Path | None:
    """The first file of a model in the cache, if it is there whole; the Hub is not asked.

    Raises UsageError if several that were pulled can be meant.
    """
    snapshot = find_snapshot(reference)
    variants = [v for v in snapshot.variants() if v.is_complete] if snapshot is not None else []
    if snapshot is None or not variants or not (reference.file or models_among(variants)):
        return None
    try:
        variant, note = choose(reference, variants)
    except ModelNotFoundError:
        return None
    if note:
        logger.warning(note)
    return snapshot.folder / variant.path


def resolve_hub(reference: Reference, progress: Progress | None = None) -> Path:
    """The file that a reference means, pulled now if it was not before. Raises as ``pull`` does."""
    found = find_pulled(reference)
    if found is not None:
        return found
    if is_offline():
        raise offline_error(reference)
    return pull(reference, progress).path


def pulled_reference(snapshot: Snapshot, variant: Variant, variants: list[Variant]) -> Reference:
    """How a model of the cache is named: by its quantisation if no other model there has that."""
    alike = [other for other in models_among(variants) if other.quant.upper() == variant.quant.upper()]
    return snapshot.reference(variant, alone=len(alike) == 1)


def _exact(reference: Reference, variant: Variant) -> Reference:
    if reference.file or not variant.quant:
        return reference.of_file(variant.path)
    return reference.of_quant(reference.quant or variant.quant)
