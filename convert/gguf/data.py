"""Where the bytes of a GGUF's metadata and tensors come from: ranges of open files, or memory.

Everything is read in chunks, so that a tensor may be larger than the memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.gguf.header import GgufHeader, open_gguf, read_errors, read_open_header

CHUNK = 4 << 20

_F32, _I32 = 0, 26
_BOOL, _STRING, _ARRAY = 7, 8, 9
_FORMATS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_TYPE_OF = {format.lstrip("<"): kind for kind, format in _FORMATS.items() if kind != _BOOL}


class Data(Protocol):
    """Bytes that can be read more than once, in order."""

    @property
    def n_bytes(self) -> int: ...

    def chunks(self) -> Iterator[bytes | memoryview]: ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that are in memory."""

    raw: bytes

    @property
    def n_bytes(self) -> int:
        return len(self.raw)

    def chunks(self) -> Iterator[bytes | memoryview]:
        yield self.raw


class Part:
    """One GGUF file, open for reading; it must stay as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = open_gguf(path)
        with read_errors(path):
            try:
                self._opened = self._state()
                self.header: GgufHeader = read_open_header(path, self._file)
            except BaseException:
                self._file.close()
                raise

    def close(self) -> None:
        self._file.close()

    def is_same_file(self, path: Path) -> bool:
        """Whether ``path`` leads to this file, by whatever name."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(path))
        except OSError:
            return False

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; raises ModelFormatError if the file does not give all of it."""
        done = 0
        with read_errors(self.path):
            self._file.seek(offset)
            while done < len(buffer):
                n_read = self._file.readinto(buffer[done:])  # type: ignore[attr-defined]
                if not n_read:
                    raise ModelFormatError(f"{self.path} became shorter while it was read")
                done += n_read

    def check_unchanged(self) -> None:
        """Raise ModelFormatError if the file was written to since it was opened."""
        with read_errors(self.path):
            if self._state() != self._opened:
                raise ModelFormatError(f"{self.path} was changed while it was read: try again")

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class FileRange:
    """``n_bytes`` bytes of a file from ``offset``."""

    part: Part
    offset: int
    n_bytes: int

    def slice(self, offset: int, n_bytes: int) -> FileRange:
        """``n_bytes`` bytes of this range from ``offset``."""
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.n_bytes:
            raise ValueError(f"{offset} + {n_bytes} lies outside a range of {self.n_bytes} bytes")
        return FileRange(self.part, self.offset + offset, n_bytes)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes; a chunk is overwritten when the next one is asked for."""
        buffer = memoryview(bytearray(min(CHUNK, self.n_bytes)))
        for start in range(0, self.n_bytes, CHUNK):
            chunk = buffer[: min(CHUNK, self.n_bytes - start)]
            self.part.read_into(chunk, self.offset + start)
            yield chunk
        self.part.check_unchanged()


@dataclass(frozen=True, slots=True)
class Kv:
    """One metadata entry: its name, and key, type and value as they stand in the file."""

    name: str
    data: Data

    @property
    def n_bytes(self) -> int:
        return self.data.n_bytes

    @classmethod
    def of(cls, name: str, value: Any) -> Kv:
        """Make an entry of a Python value.

        bool, str and float (stored as F32) have one type each; an int is U32, or I32 if negative, or 64 bits
        if it is larger than that. A list is an array of what its items are; a numpy array or scalar keeps
        its type. Raises UsageError for anything else.
        """
        key = name.encode()
        type_id, raw = _encode(name, value)
        return cls(name, Memory(_number(len(key), 8) + key + _number(type_id, 4) + raw))


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to write: name, shape in ggml order (the fastest dimension first), type, and its bytes."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    data: Data

    @property
    def n_bytes(self) -> int:
        return self.data.n_bytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes in order; a chunk may be overwritten when the next one is asked for."""
        return iter(self.data.chunks())

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> TensorPlan:
        """Make a tensor of an array: I32 if its values are integers, else F32. Raises UsageError."""
        if not 1 <= array.ndim <= 4 or not array.size:
            raise UsageError(f"tensor {name} cannot have the shape {array.shape}")
        if array.dtype.kind not in "fiub":
            raise UsageError(f"tensor {name} cannot be stored as {array.dtype}")
        type_id, stored = (_F32, "<f4") if array.dtype.kind == "f" else (_I32, "<i4")
        raw = np.ascontiguousarray(array, stored).tobytes()
        return cls(name, tuple(reversed(array.shape)), type_id, Memory(raw))


def _encode(name: str, value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        raw = value.encode(errors="replace")  # the bytes of a file name need not be UTF-8
        return _STRING, _number(len(raw), 8) + raw
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        items = b"".join(_encode(name, item)[1] for item in value)
        return _ARRAY, _number(_STRING, 4) + _number(len(value), 8) + items
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    is_plain = not isinstance(value, (np.ndarray, np.generic))
    if array.ndim <= 1 and (array.size or not is_plain) and array.dtype.kind in "biuf":
        kind = _kind(array, is_plain)
        raw = array.astype(_FORMATS[kind]).tobytes()
        return (kind, raw) if not array.ndim else (_ARRAY, _number(kind, 4) + _number(array.size, 8) + raw)
    raise UsageError(
        f"metadata {name} cannot be stored: {value!r:.60} is no number, text or list of one type"
    )


def _kind(array: np.ndarray, is_plain: bool) -> int:
    """The metadata type for an array's values; a Python number has the smallest that readers expect."""
    if array.dtype.kind == "b":
        return _BOOL
    if not is_plain:
        return _TYPE_OF.get(array.dtype.str.lstrip("<|=>"), _TYPE_OF["f4"])
    if array.dtype.kind == "f":
        return _TYPE_OF["f4"]
    low, high = int(array.min()), int(array.max())
    if low >= 0:
        return _TYPE_OF["u4"] if high < 1 << 32 else _TYPE_OF["u8"]
    return _TYPE_OF["i4"] if low >= -(1 << 31) and high < 1 << 31 else _TYPE_OF["i8"]


def _number(value: int, n_bytes: int) -> bytes:
    return value.to_bytes(n_bytes, "little")
