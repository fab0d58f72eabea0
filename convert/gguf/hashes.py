"""Hashes of a model's tensors that do not depend on its layout: equal ones mean equal weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.gguf import keys
from mobile_gguf.progress import Progress, no_progress

from .experts import read_experts
from .file import GgufSource
from .layout import stacked_tensors


@dataclass(frozen=True)
class TensorHash:
    """A tensor as a stacked file has it: type, shape in ggml order, sha256 of its bytes in hexadecimal."""

    type_id: int
    shape: tuple[int, ...]
    sha256: str


def tensor_hashes(path: Path, progress: Progress = no_progress) -> dict[str, TensorHash]:
    """Hash every tensor of a model, by the names of the stacked layout; ``mobile.*`` tensors are left out.

    Trailing dimensions of 1 are left out of shapes. Raises what ``GgufSource.open`` and ``read_experts``
    raise.
    """
    with GgufSource.open(path) as source:
        experts = read_experts(source)
        own = [tensor for tensor in experts.others if not keys.is_ours(tensor.name)]
        tensors = [*own, *stacked_tensors(source, experts)]
        total, done = max(1, sum(tensor.n_bytes for tensor in tensors)), 0
        hashes = {}
        for tensor in tensors:
            digest = hashlib.sha256()
            for chunk in tensor.chunks():
                digest.update(chunk)
                done += len(chunk)
                progress(f"hashing {source.path.name}", done / total)
            shape = tensor.shape
            while len(shape) > 1 and shape[-1] == 1:
                shape = shape[:-1]
            hashes[tensor.name] = TensorHash(tensor.type_id, shape, digest.hexdigest())
        return hashes


def differences(one: Path, other: Path, progress: Progress = no_progress) -> list[str]:
    """The tensors that differ between two models, each with how; empty if the weights are the same."""
    ours, theirs = tensor_hashes(one, progress), tensor_hashes(other, progress)
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            found.append(f"{name}: only in {other if a is None else one}")
        elif (a.type_id, a.shape) != (b.type_id, b.shape):
            found.append(f"{name}: type {a.type_id} {a.shape} against type {b.type_id} {b.shape}")
        elif a.sha256 != b.sha256:
            found.append(f"{name}: other bytes")
    return found
