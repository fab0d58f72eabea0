"""Reading the header of a safetensors file that nobody vouches for.

Every number is checked against the file before it is used; what is accepted is what the safetensors format
allows (https://github.com/huggingface/safetensors#format), less what no checkpoint needs.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.wording import plain, why

# the types that the pinned converter reads, and their bytes
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 32 << 20  # three times that of the largest published checkpoint, were it one file
MAX_NAME = 512
_MAX_DIMS = 8


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: bytes ``offset`` to ``offset + n_bytes`` of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


def read_safetensors_header(path: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file, by offset; the data is not read.

    Raises ModelFormatError: truncated, not JSON, or ranges that overlap, leave the file or fit no shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise _bad(path, f"it is truncated, or no safetensors file ({size} bytes)")
            if length > MAX_HEADER_BYTES:
                raise _bad(path, f"its header claims {length} bytes, more than {MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {why(error)}") from error
    header = _parse(path, text)
    start = 8 + length
    tensors = [_tensor(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps another" if tensor.offset < end else "leaves a gap before it"
            raise _bad(path, f"the data of tensor {_short(tensor.name)} {what}")
        end += tensor.n_bytes
    if end != size:
        what = f"its tensors need {end} bytes, the file has {size}"
        raise _bad(path, f"it is truncated: {what}" if end > size else what)
    return tensors


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise _bad(path, f"{_short(twice)} stands in its header twice")
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is no JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, start: int) -> SourceTensor:
    if len(name) > MAX_NAME:
        raise _bad(path, f"a tensor's name has {len(name)} characters, {_short(name)}")
    if not isinstance(entry, dict):
        raise _bad(path, f"its header says nothing usable about tensor {_short(name)}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(
            path, f"tensor {_short(name)} has the type {_short(dtype)}, which the converter does not read"
        )
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise _bad(path, f"tensor {_short(name)} has the impossible shape {_short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _bad(path, f"tensor {_short(name)} has the impossible range {_short(offsets)}")
    n_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BYTES[dtype] != n_bytes:
        raise _bad(path, f"tensor {_short(name)} has {n_bytes} bytes, which is not {dtype} {_short(shape)}")
    return SourceTensor(name, dtype, tuple(shape), path, start + offsets[0], n_bytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in value
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = plain(text[:200])
    return text if len(text) <= 80 else text[:77] + "..."


def _bad(path: Path, reason: str) -> ModelFormatError:
    return ModelFormatError(f"{path} cannot be converted: {reason}; download or copy it again")
