"""Importance matrices: how much each input of a matrix matters, measured by llama.cpp's llama-imatrix.

Two file formats: a GGUF with ``NAME.in_sum2`` and ``NAME.counts`` for each matrix, and the older binary one.
Both are read as llama-quantize reads them (its tools/quantize, common/imatrix-loader), with every length
checked against the file first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mobile_gguf.errors import ModelFormatError, ModelNotFoundError
from mobile_gguf.gguf.header import MAGIC, GgufHeader, TensorInfo, read_header
from mobile_gguf.wording import why

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = 0
_MAX_ENTRIES, _MAX_NAME, _MAX_VALUES = 1 << 20, 1 << 12, 1 << 28


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared inputs by tensor name; float32, [n_expert * n_in] for stacked experts."""

    path: Path
    values: dict[str, np.ndarray]
    dataset: str
    n_chunks: int


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of either format.

    Raises ModelNotFoundError or ModelFormatError, also for values that are not finite or negative.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
            if is_gguf:
                matrix = _read_gguf(path, file)
            else:
                file.seek(0)
                matrix = _read_legacy(path, file)
    except FileNotFoundError:
        raise ModelNotFoundError(f"no such importance matrix: {path}") from None
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {why(error)}") from None
    if not matrix.values:
        raise _bad(path, "it holds no entries")
    for name, values in matrix.values.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise _bad(path, f"the entry {name:.100} holds values that are negative or not finite")
    return matrix


def _read_gguf(path: Path, file: BinaryIO) -> ImportanceMatrix:
    header = read_header(path)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    if header.metadata.get("general.type", "imatrix") != "imatrix":
        raise _bad(path, f"it is a GGUF of the type {header.metadata['general.type']!r:.40}")
    values = {}
    for name, sums in tensors.items():
        if not name.endswith(_SUMS):
            continue
        entry = name.removesuffix(_SUMS)
        counts = tensors.get(entry + _COUNTS)
        if counts is None:
            raise _bad(path, f"{entry:.100} has sums and no counts")
        values[entry] = _means(path, entry, _floats(file, header, sums), _floats(file, header, counts))
    datasets = header.metadata.get("imatrix.datasets")
    chunks = header.metadata.get("imatrix.chunk_count")
    return ImportanceMatrix(
        path,
        values,
        str(datasets[0]) if isinstance(datasets, list) and datasets else "",
        chunks if isinstance(chunks, int) else 0,
    )


def _floats(file: BinaryIO, header: GgufHeader, tensor: TensorInfo) -> np.ndarray:
    if tensor.type_id != _F32:
        raise _bad(header.path, f"{tensor.name:.100} is not F32")
    file.seek(header.data_start + tensor.offset)
    return np.frombuffer(file.read(tensor.n_bytes), "<f4")


def _means(path: Path, entry: str, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over counts, one count per expert; an expert that was never used counts as 1 everywhere."""
    if not counts.size or sums.size % counts.size:
        raise _bad(path, f"{entry:.100} has {sums.size} sums for {counts.size} counts")
    if not np.isfinite(counts).all():
        raise _bad(path, f"{entry:.100} has counts that are not finite")
    counts = np.round(counts).astype(np.float32)[:, None]
    means = sums.reshape(counts.size, -1) / np.where(counts > 0, counts, 1)
    return np.where(counts > 0, means, 1).astype(np.float32).reshape(-1)


def _read_legacy(path: Path, file: BinaryIO) -> ImportanceMatrix:
    left = path.stat().st_size

    def take(n_bytes: int) -> bytes:
        nonlocal left
        if n_bytes > left:
            raise _bad(path, "it is truncated, or no importance matrix")
        left -= n_bytes
        return file.read(n_bytes)

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    n_entries = number()
    if not 0 < n_entries <= _MAX_ENTRIES:
        raise _bad(path, f"it claims {n_entries} entries")
    values = {}
    for _ in range(n_entries):
        length = number()
        if not 0 < length <= _MAX_NAME:
            raise _bad(path, f"a name in it claims {length} bytes")
        name = take(length).decode("utf-8", errors="replace")
        n_calls, n_values = number(), number()
        if not 0 < n_values <= _MAX_VALUES:
            raise _bad(path, f"the entry {name:.100} claims {n_values} values")
        sums = np.frombuffer(take(4 * n_values), "<f4")
        values[name] = sums / np.float32(n_calls) if n_calls > 0 else sums
    n_chunks, dataset = 0, ""
    if left >= 8:  # newer files end in the number of chunks and the name of the text
        n_chunks, length = number(), number()
        if 0 < length <= left:
            dataset = take(length).decode("utf-8", errors="replace")
    return ImportanceMatrix(path, values, dataset, n_chunks)


def _bad(path: Path, reason: str) -> ModelFormatError:
    return ModelFormatError(f"{path} cannot be used as an importance matrix: {reason}")
