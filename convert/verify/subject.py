"""A GGUF as a verification sees it: its types, and how many bits a weight has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.gguf import keys
from mobile_gguf.gguf.header import TensorInfo, read_header
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info

EXACT_TYPES = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True)
class Subject:
    """A model file, or all files of a split one; ``types`` is tensor name -> GGUF type name."""

    path: Path
    info: GgufInfo
    types: dict[str, str]
    n_parameters: int
    bits_per_weight: float

    @property
    def is_exact(self) -> bool:
        """Whether float32 arithmetic reads every tensor without loss."""
        return set(self.types.values()) <= EXACT_TYPES

    @property
    def is_rounding(self) -> bool:
        """Whether llama.cpp's own products with its matrices would round the activations."""
        return set(self.types.values()) != {"F32"}


def read_subject(path: Path) -> Subject:
    """Read the headers of a model; raises ModelNotFoundError, ModelFormatError."""
    info = read_gguf_info(path)
    tensors = [
        tensor for part in info.files for tensor in read_header(part).tensors if not keys.is_ours(tensor.name)
    ]
    matrices = [tensor for tensor in tensors if sum(n > 1 for n in tensor.shape) > 1] or tensors
    return Subject(
        path=path,
        info=info,
        types={tensor.name: _type_name(tensor.type_id) for tensor in tensors},
        n_parameters=_n_weights(tensors),
        bits_per_weight=8 * sum(tensor.n_bytes for tensor in matrices) / _n_weights(matrices),
    )


def _n_weights(tensors: Sequence[TensorInfo]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _type_name(type_id: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(type_id).name
    except ValueError:
        return f"type {type_id}"
