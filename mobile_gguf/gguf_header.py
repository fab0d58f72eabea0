"""A light reader of GGUF headers: metadata and the tensor table, never tensor data.

Every length is checked against the file before it is believed, because a GGUF is untrusted
input and the engine's own messages for a damaged one say little. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ModelFormatError, ModelNotFoundError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Longer arrays are vocabularies; nothing here asks for them.
_KEPT_ARRAY = 4096
_MAX_STRING = 1 << 26
_MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table; ``offset`` counts from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]  # ggml order: the fastest dimension first
    type_id: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What one GGUF file says about itself. Long arrays in ``metadata`` stand as None."""

    path: Path
    version: int
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    file_bytes: int


def read_header(path: Path) -> GgufHeader:
    """Read and check one GGUF file's header.

    Raises ModelNotFoundError if there is no such file, ModelFormatError if it is not a GGUF, is
    damaged, or ends before its tensors do.
    """
    try:
        with open(path, "rb") as file:
            return _Reader(path, file).read()
    except FileNotFoundError:
        raise ModelNotFoundError(f"no such model file: {path}") from None
    except IsADirectoryError:
        raise ModelFormatError(f"{path} is a directory, not a GGUF file") from None
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, 2)
        self.left = self.size
        self.array_lengths: dict[str, int] = {}
        file.seek(0)

    def read(self) -> GgufHeader:
        magic = self.file.read(4)
        self.left -= len(magic)
        if magic != MAGIC:
            what = "is empty" if self.size == 0 else f"starts with {magic!r} instead of {MAGIC!r}"
            raise ModelFormatError(f"{self.path} is not a GGUF file: it {what}")
        version = self.unpack("I")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                self.fail("it is a big-endian GGUF; convert it for this machine")
            self.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        n_tensors, n_metadata = self.unpack("Q"), self.unpack("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = self.string()
            metadata[key] = self.value(key, self.unpack("I"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two")
        table = [self.tensor_row() for _ in range(n_tensors)]
        data_start = math.ceil(self.file.tell() / alignment) * alignment
        tensors = self.sized(table, data_start, alignment)
        return GgufHeader(self.path, version, metadata, self.array_lengths, tensors, data_start, self.size)

    def fail(self, reason: str) -> None:
        raise ModelFormatError(f"{self.path} cannot be used: {reason}")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.left:
            self.fail(f"its header is truncated ({self.size} bytes in all)")
        self.left -= n_bytes
        return self.file.read(n_bytes)

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.left:
            self.fail(f"its header is truncated ({self.size} bytes in all)")
        self.left -= n_bytes
        self.file.seek(n_bytes, 1)

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.unpack("Q")
        if length > _MAX_STRING:
            self.fail(f"a string in its header claims {length} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"metadata {key} has the unknown type {kind}")
        return self.array(key)

    def array(self, key: str) -> list[Any] | None:
        kind, length = self.unpack("I"), self.unpack("Q")
        self.array_lengths[key] = length
        if kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            if length > _KEPT_ARRAY:
                self.skip(size * length)
                return None
            return list(struct.unpack(f"<{length}{_SCALARS[kind]}", self.take(size * length)))
        if kind != _STRING:
            self.fail(f"metadata {key} is an array of the unsupported type {kind}")
        if length <= _KEPT_ARRAY:
            return [self.string() for _ in range(length)]
        for _ in range(length):
            self.skip(self.unpack("Q"))
        return None

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        n_dims = self.unpack("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            self.fail(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self.unpack("Q") for _ in range(n_dims))
        if not all(shape) or math.prod(shape) >= 1 << 62:
            self.fail(f"tensor {name} has the impossible shape {shape}")
        return name, shape, self.unpack("I"), self.unpack("Q")

    def sized(
        self, table: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> tuple[TensorInfo, ...]:
        sizes = _type_sizes()
        offsets = sorted({row[3] for row in table})
        ends = dict(zip(offsets, [*offsets[1:], self.size - data_start], strict=False))
        tensors = []
        for name, shape, type_id, offset in table:
            if offset % alignment:
                self.fail(f"tensor {name} is not aligned to {alignment} bytes")
            if type_id in sizes:
                block, block_bytes = sizes[type_id]
                if shape[0] % block:
                    self.fail(f"tensor {name} has rows of {shape[0]}, not a multiple of {block}")
                n_bytes = math.prod(shape) // block * block_bytes
            else:  # a type newer than the gguf package: as much as there is up to the next tensor
                n_bytes = max(0, ends[offset] - offset)
            tensors.append(TensorInfo(name, shape, type_id, offset, n_bytes))
        needed = data_start + max((tensor.offset + tensor.n_bytes for tensor in tensors), default=0)
        if tensors and needed > self.size:
            raise ModelFormatError(
                f"{self.path} is truncated: its tensors need {needed} bytes, the file has {self.size};"
                " download or copy it again"
            )
        self.check_apart(tensors)
        return tuple(tensors)

    def check_apart(self, tensors: list[TensorInfo]) -> None:
        """No name twice, and no byte in two tensors."""
        names = set[str]()
        for tensor in tensors:
            if tensor.name in names:
                self.fail(f"tensor {tensor.name} is there twice")
            names.add(tensor.name)
        in_order = sorted(tensors, key=lambda tensor: tensor.offset)
        for tensor, following in itertools.pairwise(in_order):
            if tensor.offset + tensor.n_bytes > following.offset:
                self.fail(f"tensors {tensor.name} and {following.name} overlap")


def _type_sizes() -> dict[int, tuple[int, int]]:
    """(elements, bytes) of a block for every tensor type that the gguf package knows."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
