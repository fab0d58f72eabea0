"""A light reader of GGUF headers: metadata and the tensor table, never tensor data.

Every length is checked against the file before it is believed, because a GGUF is untrusted
input and the engine's own messages for a damaged one say little. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mobile_gguf.errors import ModelFormatError, ModelNotFoundError
from mobile_gguf.wording import why

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Longer arrays are vocabularies; nothing here asks for them.
_KEPT_ARRAY = 4096
_MAX_STRING = 1 << 26
_MAX_DIMS = 4
# Far above any model, so that a hostile header costs neither minutes nor the memory: entries, names as
# the format and ggml limit them, and the bytes that are kept of all values together.
_MAX_METADATA, _MAX_TENSORS, _MAX_STRINGS = 1 << 16, 1 << 20, 1 << 22
_MAX_KEY, _MAX_NAME = (1 << 16) - 1, 63
_MAX_KEPT = 1 << 27
# What the engine knows and the gguf package does not yet.
_NEWER_TYPES = {42: (64, 18)}  # Q2_0


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table; ``offset`` counts from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]  # ggml order: the fastest dimension first
    type_id: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """Where a metadata entry stands in its file: key, type and value, ``n_bytes`` from ``offset``."""

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
    entries: dict[str, MetadataEntry]
    alignment: int


def read_header(path: Path) -> GgufHeader:
    """Read and check one GGUF file's header.

    Raises ModelNotFoundError if there is no such file, ModelFormatError if it is not a GGUF, is
    damaged, or ends before its tensors do.
    """
    with open_gguf(path) as file, read_errors(path):
        return read_open_header(path, file)


def open_gguf(path: Path) -> BinaryIO:
    """Open a file for reading; raises as ``read_header`` does. A pipe, which would wait, is refused."""
    with read_errors(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelFormatError(f"{path} is not a regular file, so not a GGUF file")
        return open(path, "rb")


def read_open_header(path: Path, file: BinaryIO) -> GgufHeader:
    """The same from a file that is open; an OSError comes out as it is."""
    return _Reader(path, file).read()


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the error that says why ``path`` cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise ModelNotFoundError(f"no such model file: {path}") from None
    except IsADirectoryError:
        raise ModelFormatError(f"{path} is a directory, not a GGUF file") from None
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {why(error)}") from None
    except ValueError as error:  # a path with a null character
        raise ModelNotFoundError(f"no such model file: {str(path)!r} ({error})") from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, 2)
        self.left = self.size
        self.kept = 0
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
        if n_metadata > _MAX_METADATA or n_tensors > _MAX_TENSORS:
            self.fail(f"its header claims {n_metadata} metadata entries and {n_tensors} tensors")
        metadata: dict[str, Any] = {}
        entries: dict[str, MetadataEntry] = {}
        for _ in range(n_metadata):
            offset = self.file.tell()
            key = self.name("a metadata key", _MAX_KEY)
            if key in metadata:
                self.fail(f"metadata {key} is there twice")
            type_id = self.unpack("I")
            metadata[key] = self.value(key, type_id)
            entries[key] = MetadataEntry(type_id, offset, self.file.tell() - offset)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        is_uint32 = "general.alignment" not in entries or entries["general.alignment"].type_id == _UINT32
        if not is_uint32 or alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r:.60}, not a power of two as a 32-bit number")
        table = [self.tensor_row() for _ in range(n_tensors)]
        data_start = math.ceil(self.file.tell() / alignment) * alignment
        tensors = self.sized(table, data_start, alignment)
        return GgufHeader(
            path=self.path,
            version=version,
            metadata=metadata,
            array_lengths=self.array_lengths,
            tensors=tensors,
            data_start=data_start,
            file_bytes=self.size,
            entries=entries,
            alignment=alignment,
        )

    def fail(self, reason: str) -> NoReturn:
        raise ModelFormatError(f"{self.path} cannot be used: {reason}")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.left:
            self.fail(f"its header is truncated ({self.size} bytes in all)")
        self.left -= n_bytes
        self.kept += n_bytes
        if self.kept > _MAX_KEPT:
            self.fail(f"its metadata takes more than {_MAX_KEPT} bytes")
        data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            self.fail("it became shorter while it was read")
        return data

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

    def name(self, what: str, longest: int) -> str:
        length = self.unpack("Q")
        if not 1 <= length <= longest:
            self.fail(f"{what} claims {length} bytes (1 to {longest} can be)")
        raw = self.take(length)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is no UTF-8 text: {raw!r:.80}")
        if not text.isprintable():  # it would reach the terminal in messages
            self.fail(f"{what} holds control characters: {text!r:.80}")
        return text

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
        if length > _MAX_STRINGS:
            self.fail(f"metadata {key} claims {length} strings")
        if length <= _KEPT_ARRAY:
            return [self.string() for _ in range(length)]
        for _ in range(length):
            self.skip(self.unpack("Q"))
        return None

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.name("a tensor's name", _MAX_NAME)
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
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in table:
            if name in tensors:
                self.fail(f"tensor {name} is there twice")
            if offset % alignment:
                self.fail(f"tensor {name} is not aligned to {alignment} bytes")
            if type_id in sizes:
                block, block_bytes = sizes[type_id]
                if shape[0] % block:
                    self.fail(f"tensor {name} has rows of {shape[0]}, not a multiple of {block}")
                n_bytes = math.prod(shape) // block * block_bytes
            else:  # a type newer than the gguf package: as much as there is up to the next tensor
                n_bytes = max(0, ends[offset] - offset)
            tensors[name] = TensorInfo(name, shape, type_id, offset, n_bytes)
        needed = data_start + max((tensor.offset + tensor.n_bytes for tensor in tensors.values()), default=0)
        if tensors and needed > self.size:
            raise ModelFormatError(
                f"{self.path} is truncated: its tensors need {needed} bytes, the file has {self.size};"
                " download or copy it again"
            )
        in_file = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(in_file):
            if before.offset + before.n_bytes > after.offset:
                self.fail(f"the data of tensors {before.name} and {after.name} overlap")
        return tuple(tensors.values())


def type_block(type_id: int) -> tuple[int, int] | None:
    """(elements, bytes) of a block of a tensor type, None for a type that nobody here knows."""
    return _type_sizes().get(type_id)


@functools.cache
def _type_sizes() -> dict[int, tuple[int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    return _NEWER_TYPES | {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
