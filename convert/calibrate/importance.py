"""How much each neuron of an expert matters: mean square of its activation times that of its down column.

A neuron adds activation * column to the layer's output, so its mean square contribution is
E[activation^2] * |column|^2. A scale or a router weight of the whole expert is left out: the measure ranks
an expert's neurons among each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.observe import InputSums

from ..gguf_data import FileRange, TensorPlan
from ..gguf_file import GgufSource, Progress, ignore

Floats = npt.NDArray[np.float32]

# stacked, or one tensor per expert (or per segment of one)
_DOWN = re.compile(r"blk\.(\d+)\.ffn_down(?:_exps|\.(\d+))\.weight")
_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)(?:_exps|\.\d+)\.weight")


def expert_layers(source: GgufSource) -> tuple[int, ...]:
    """The numbers of the layers with routed experts, ascending."""
    return tuple(
        sorted({int(m[1]) for tensor in source.tensors if (m := _EXPERT.fullmatch(tensor.name)) is not None})
    )


def neuron_importance(
    source: GgufSource, inputs: Mapping[str, InputSums], n_expert: int, progress: Progress = ignore
) -> dict[int, Floats]:
    """Importance of every routed expert's neurons by layer, [n_expert, n_ff]; 0 where nothing was seen.

    ``inputs`` are the sums of the model's ``ffn_down_exps`` weights. Neurons are in the file's order, those
    of a segmented expert segment after segment. Memory is that of one dequantised expert. Raises
    ModelFormatError if a tensor's type cannot be read or does not fit what was observed.
    """
    found: dict[int, Floats] = {}
    matrices = list(_down_matrices(source))
    for number, matrix in enumerate(matrices):
        progress(f"neuron importance: layer {matrix.layer}, expert {matrix.index}", number / len(matrices))
        sums = inputs.get(f"blk.{matrix.layer}.ffn_down_exps.weight")
        if sums is None:
            continue  # a layer that this model does not run in ordinary decoding
        if matrix.layer not in found:
            found[matrix.layer] = sums.mean()
        n_mat, n_row = found[matrix.layer].shape
        if matrix.index >= n_mat or matrix.n_ff != n_row or n_mat % n_expert:
            raise ModelFormatError(f"{source.path}: layer {matrix.layer} is not the one that was observed")
        found[matrix.layer][matrix.index] *= _column_norms(source, matrix)
    progress("neuron importance", 1.0)
    return {layer: values.reshape(n_expert, -1) for layer, values in found.items()}


@dataclass(frozen=True)
class _DownMatrix:
    """One expert's down projection: [n_embd rows, n_ff columns] of ``tensor`` from byte ``start``."""

    layer: int
    index: int
    tensor: TensorPlan
    start: int
    n_bytes: int
    n_ff: int
    n_embd: int


def _down_matrices(source: GgufSource) -> Iterator[_DownMatrix]:
    for tensor in source.tensors:
        match = _DOWN.fullmatch(tensor.name)
        if match is None:
            continue
        stacked = match[2] is None
        if len(tensor.shape) != (3 if stacked else 2):
            raise ModelFormatError(f"{source.path}: tensor {tensor.name} has the shape {tensor.shape}")
        n_ff, n_embd, *rest = tensor.shape
        n_mat = rest[0] if stacked else 1
        size = tensor.n_bytes // n_mat
        for i in range(n_mat):
            index = i if stacked else int(match[2])
            yield _DownMatrix(int(match[1]), index, tensor, i * size, size, n_ff, n_embd)


def _column_norms(source: GgufSource, matrix: _DownMatrix) -> Floats:
    """Squared norms of a down projection's columns, [n_ff]."""
    from gguf import GGMLQuantizationType, dequantize

    data = matrix.tensor.data
    assert isinstance(data, FileRange)  # a tensor of a file that was opened
    raw = b"".join(bytes(chunk) for chunk in data.slice(matrix.start, matrix.n_bytes).chunks())
    rows = np.frombuffer(raw, np.uint8).reshape(matrix.n_embd, -1)
    try:
        weights = dequantize(rows, GGMLQuantizationType(matrix.tensor.type_id))
    except (NotImplementedError, ValueError) as error:
        raise ModelFormatError(
            f"{source.path}: the type of tensor {matrix.tensor.name} cannot be read here ({error})"
        ) from None
    if weights.shape != (matrix.n_embd, matrix.n_ff):
        raise ModelFormatError(
            f"{source.path}: tensor {matrix.tensor.name} does not hold {matrix.n_ff} columns"
        )
    return np.einsum("ij,ij->j", weights, weights, dtype=np.float32)
