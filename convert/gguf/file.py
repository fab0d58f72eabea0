"""GGUF files as lists of metadata entries and tensors: read, written and edited without interpreting them.

Metadata is copied byte for byte and tensors are streamed, so nothing is lost and the memory does not
depend on the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.files.atomic import replacing_file
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.checks import check_model
from mobile_gguf.gguf.experts import FORMAT_VERSION
from mobile_gguf.gguf.header import DEFAULT_ALIGNMENT, MAGIC
from mobile_gguf.gguf.info import other_parts
from mobile_gguf.progress import Progress, no_progress

from ..meter import Meter
from .data import FileRange, Kv, Part, TensorPlan

_FILE_VERSION = 3
_ALIGNMENT_KEY = "general.alignment"
_SPLIT_PREFIX = "split."
_F32, _I32 = 0, 26


class GgufSource:
    """A GGUF that is open for reading, all parts of it if it is split; a context manager.

    ``kv`` holds the metadata without the keys that only say how the file is split, ``metadata`` the same
    decoded (long arrays stand as None), ``tensors`` those of all parts in order, ``alignment`` the value of
    ``general.alignment``, 0 if there is no such key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[Part] = []
        try:
            self.parts.append(Part(path))
            first = self.parts[0].header
            self.parts += (Part(other) for other in other_parts(first))
            check_version(path, first.metadata)
            self.metadata = _without_split(first.metadata)
            self.kv = tuple(
                Kv(name, FileRange(self.parts[0], entry.offset, entry.n_bytes))
                for name, entry in _without_split(first.entries).items()
            )
            self.alignment: int = first.alignment if _ALIGNMENT_KEY in first.metadata else 0
            self.tensors = self._all_tensors(first.metadata.get("split.tensors.count"))
            infos = (info for part in self.parts for info in part.header.tensors)
            check_model(path, first.metadata, first.array_lengths, infos)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufSource:
        """Open a GGUF, or all parts of a split one by its first part.

        Raises ModelNotFoundError (no file, a missing part), ModelFormatError (not a GGUF, damaged, of a newer
        ``mobile.version``).
        """
        return cls(Path(path))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(part.path for part in self.parts)

    @property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    def tensor(self, name: str) -> TensorPlan | None:
        """The tensor of that name."""
        return self._by_name.get(name)

    def array(self, name: str) -> np.ndarray:
        """Read an F32 or I32 tensor whole; numpy's order of dimensions, the slowest first.

        Raises ModelFormatError if it is not there or of another type.
        """
        tensor = self.tensor(name)
        if tensor is None:
            raise ModelFormatError(f"{self.path} has no tensor {name}")
        if tensor.type_id not in (_F32, _I32):
            raise ModelFormatError(f"tensor {name} of {self.path} is neither F32 nor I32")
        values = np.empty(tensor.n_bytes // 4, "<f4" if tensor.type_id == _F32 else "<i4")
        raw, start = values.data.cast("B"), 0
        for chunk in tensor.chunks():
            raw[start : start + len(chunk)] = chunk
            start += len(chunk)
        return values.reshape(tuple(reversed(tensor.shape)))

    def check_target(self, path: Path) -> None:
        """Raise UsageError if ``path`` is one of the files that are read."""
        if any(part.is_same_file(path) for part in self.parts):
            raise UsageError(f"{path} is the file that is read: give another output")

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _all_tensors(self, claimed: Any) -> tuple[TensorPlan, ...]:
        self._by_name: dict[str, TensorPlan] = {}
        for part in self.parts:
            start = part.header.data_start
            for info in part.header.tensors:
                if info.name in self._by_name:
                    raise ModelFormatError(
                        f"{self.path} cannot be used: tensor {info.name} stands in two parts"
                    )
                data = FileRange(part, start + info.offset, info.n_bytes)
                self._by_name[info.name] = TensorPlan(info.name, info.shape, info.type_id, data)
        if len(self.parts) > 1 and claimed != len(self._by_name):
            raise ModelFormatError(
                f"{self.path} cannot be used: its parts hold {len(self._by_name)} tensors,"
                f" they should hold {claimed!r:.20}"
            )
        return tuple(self._by_name.values())


def check_version(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise ModelFormatError if the file was made by a mobile-gguf with a newer format than this one's."""
    version = metadata.get(keys.VERSION, FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ModelFormatError(f"{path} cannot be used: metadata {keys.VERSION} is {version!r:.60}")
    if version > FORMAT_VERSION:
        raise ModelFormatError(
            f"{path} has {keys.VERSION} {version}, this program knows {FORMAT_VERSION}: update mobile-gguf"
        )


def gguf_bytes(kv: Iterable[Kv], tensors: Iterable[TensorPlan], alignment: int) -> int:
    """The size of the file that ``write_gguf`` would write."""
    return _Layout(kv, tensors, alignment).file_bytes


def write_gguf(
    path: Path,
    kv: Iterable[Kv],
    tensors: Iterable[TensorPlan],
    alignment: int = 0,
    progress: Progress = no_progress,
    what: str = "",
) -> int:
    """Write a GGUF, complete or not at all; returns its size in bytes.

    ``alignment`` is the value of ``general.alignment``; 0 leaves the key out, which means 32. ``progress``
    gets ``what``, the tensor's number, bytes and the time left, and the share done. Raises MobileError when
    the disk is full or refuses, and what reading the tensors raises.
    """
    path = Path(path)
    layout = _Layout(kv, tensors, alignment)
    with replacing_file(path, layout.file_bytes) as file:
        file.truncate(layout.file_bytes)  # what is skipped over reads as zeros
        meter = Meter(progress, what or f"writing {path.name}", layout.n_bytes)
        for piece in layout.header():
            _write(file, piece)
        position = layout.data_start
        for number, tensor in enumerate(layout.tensors, 1):
            file.seek(position)
            written = 0
            for chunk in tensor.chunks():
                _write(file, chunk)
                written += len(chunk)
                meter.update(number, len(layout.tensors), position - layout.data_start + written)
            if written != tensor.n_bytes:
                raise ModelFormatError(f"tensor {tensor.name} gave {written} bytes of {tensor.n_bytes}")
            position += _padded(written, layout.alignment)
        progress(f"{meter.phase}: waiting for the disk", 1.0)
    return layout.file_bytes


def update_gguf(
    path: Path,
    set: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    add_tensors: Mapping[str, np.ndarray] | None = None,
    out: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Rewrite a GGUF with other metadata and more tensors; returns the file's path.

    ``drop`` are prefixes of the metadata keys and tensors to leave out; then ``set`` (see ``Kv.of``) and
    ``add_tensors`` (see ``TensorPlan.of``) replace what has their name or are added. Without ``out`` the file
    itself is replaced, when the new one is complete. ``mobile.version`` is added where it is missing.
    Raises UsageError for a split file without ``out``, and what ``GgufSource.open`` and ``write_gguf`` raise.
    """
    path = Path(path)
    with GgufSource.open(path) as source:
        if out is None and len(source.parts) > 1:
            raise UsageError(
                f"{path} is split into {len(source.parts)} files: join them with `mobile-gguf convert` first"
            )
        dropped = tuple(drop)
        metadata = {kv.name: kv for kv in source.kv if not kv.name.startswith(dropped)}
        metadata |= {name: Kv.of(name, value) for name, value in (set or {}).items()}
        tensors = {t.name: t for t in source.tensors if not t.name.startswith(dropped)}
        added = {name: TensorPlan.of(name, array) for name, array in (add_tensors or {}).items()}
        tensors |= {name: tensor for name, tensor in added.items() if name in tensors}
        extra = [tensor for name, tensor in added.items() if name not in tensors]
        if keys.VERSION not in metadata and any(keys.is_ours(name) for name in (*metadata, *added)):
            metadata[keys.VERSION] = Kv.of(keys.VERSION, FORMAT_VERSION)
        ordered = _before_experts(list(tensors.values()), extra)
        target = path if out is None else Path(out)
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if out is not None:
            source.check_target(target)
        write_gguf(target, metadata.values(), ordered, source.alignment, progress)
        if out is None:
            os.chmod(target, mode)
    return target


def _before_experts(tensors: list[TensorPlan], extra: list[TensorPlan]) -> list[TensorPlan]:
    """Add tensors at the end, but before the experts where those have a tensor each."""
    parts = [tensor.name.split(".") for tensor in tensors]
    first = next(
        (i for i, p in enumerate(parts) if len(p) == 5 and p[0] == "blk" and p[3].isdigit()), len(tensors)
    )
    return tensors[:first] + extra + tensors[first:]


class _Layout:
    """Where everything comes to stand in a file that is going to be written."""

    def __init__(self, kv: Iterable[Kv], tensors: Iterable[TensorPlan], alignment: int) -> None:
        entries = {entry.name: entry for entry in kv}
        if alignment:
            entries[_ALIGNMENT_KEY] = Kv.of(_ALIGNMENT_KEY, alignment)
        else:
            entries.pop(_ALIGNMENT_KEY, None)
        self.kv = tuple(entries.values())
        self.tensors = tuple(tensors)
        self.alignment = alignment or DEFAULT_ALIGNMENT
        table = bytearray()
        position = 0
        for tensor in self.tensors:
            name = tensor.name.encode()
            table += _number(len(name), 8) + name + _number(len(tensor.shape), 4)
            table += b"".join(_number(n, 8) for n in tensor.shape)
            table += _number(tensor.type_id, 4) + _number(position, 8)
            position += _padded(tensor.n_bytes, self.alignment)
        self.table = memoryview(table)
        self.n_bytes = position
        header_bytes = 24 + sum(entry.n_bytes for entry in self.kv) + len(self.table)
        self.data_start = _padded(header_bytes, self.alignment)
        self.file_bytes = self.data_start + self.n_bytes

    def header(self) -> Iterable[bytes | memoryview]:
        counts = (len(self.tensors), len(self.kv))
        yield MAGIC + _number(_FILE_VERSION, 4) + b"".join(_number(count, 8) for count in counts)
        for entry in self.kv:
            yield from entry.data.chunks()
        yield self.table


def _without_split(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if not name.startswith(_SPLIT_PREFIX)}


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while len(left):
        left = left[file.write(left) :]


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _number(value: int, n_bytes: int) -> bytes:
    return value.to_bytes(n_bytes, "little")
