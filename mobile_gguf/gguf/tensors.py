"""Small tensors of ours, read out of a model's files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .header import read_header
from .info import GgufInfo

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TYPES = {0: "<f4", 26: "<i4"}  # ggml's numbers


class TensorError(Exception):
    """A tensor that is there cannot be used; the text says why."""


def read_tensor(info: GgufInfo, name: str, dtype: type[np.generic]) -> npt.NDArray | None:
    """Its values, the slowest dimension first; None if no file has it. Raises TensorError."""
    import numpy as np

    for path in info.files:
        header = read_header(path)
        for tensor in header.tensors:
            if tensor.name != name:
                continue
            kind = _TYPES.get(tensor.type_id)
            if kind is None or np.dtype(kind) != np.dtype(dtype):
                raise TensorError(f"{name} has another type")
            with open(path, "rb") as file:
                file.seek(header.data_start + tensor.offset)
                values = np.frombuffer(file.read(tensor.n_bytes), kind)
            if len(values) != math.prod(tensor.shape):
                raise TensorError(f"{name} is cut off")
            return values.astype(dtype).reshape(tuple(reversed(tensor.shape)))
    return None
