"""How much each neuron of an expert matters: mean square of its activation times that of its down column.

A neuron adds activation * column to the layer's output, so its mean square contribution is
E[activation^2] * |column|^2. A scale or a router weight of the whole expert is left out: the measure ranks
an expert's neurons among each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.observe import InputSums
from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf.experts import DOWN
from mobile_gguf.progress import Progress, no_progress

from ..gguf.data import FileRange
from ..gguf.experts import Stack, read_experts, stored_order
from ..gguf.file import GgufSource

Floats = npt.NDArray[np.float32]


def neuron_importance(
    source: GgufSource, inputs: Mapping[str, InputSums], progress: Progress = no_progress
) -> dict[int, Floats]:
    """Importance of every routed expert's neurons by layer, [n_expert, n_ff]; 0 where nothing was seen.

    ``inputs`` are the sums of the model's ``ffn_down_exps`` weights, of experts or of their segments. Neurons
    stand as in the stacked file, whatever the order in this one. Memory is that of one dequantised matrix.
    Raises ModelFormatError if a tensor's type cannot be read or does not fit what was observed.
    """
    found: dict[int, Floats] = {}
    stacks = [stack for stack in read_experts(source).stacks if stack.kind == DOWN]
    for number, stack in enumerate(stacks):
        sums = inputs.get(stack.stacked_name)
        if sums is None:
            continue  # a layer that this model does not run in ordinary decoding
        mean, shape = sums.mean(), (len(stack.pieces), stack.width)
        if mean.size != shape[0] * shape[1] or len(mean) not in (stack.n_expert, len(stack.pieces)):
            raise ModelFormatError(f"{source.path}: layer {stack.layer} is not the one that was observed")
        values = mean.reshape(shape)
        for index, piece in enumerate(stack.pieces):
            share = (number + index / len(stack.pieces)) / len(stacks)
            progress(f"neuron importance: layer {stack.layer}", share)
            values[index] *= _column_norms(source, stack, piece)
        found[stack.layer] = _as_stacked(source, stack, values)
    progress("neuron importance", 1.0)
    return found


def _as_stacked(source: GgufSource, stack: Stack, values: Floats) -> Floats:
    """[n_piece, width] in this file's order as [n_expert, n_ff] in the stacked file's."""
    values = values.reshape(stack.n_expert, -1)
    order = stored_order(source, stack)
    if order is None:
        return values
    stacked = np.empty_like(values)
    np.put_along_axis(stacked, order.astype(np.int64), values, axis=1)
    return stacked


def _column_norms(source: GgufSource, stack: Stack, piece: FileRange) -> Floats:
    """Squared norms of the columns of one expert's (or segment's) down projection, [width]."""
    from gguf import GGMLQuantizationType, dequantize

    raw = b"".join(bytes(chunk) for chunk in piece.chunks())
    rows = np.frombuffer(raw, np.uint8).reshape(stack.shape[1], -1)
    try:
        weights = dequantize(rows, GGMLQuantizationType(stack.type_id))
    except (NotImplementedError, ValueError) as error:
        raise ModelFormatError(
            f"{source.path}: the type of {stack.stacked_name} cannot be read here ({error})"
        ) from None
    return np.einsum("ij,ij->j", weights, weights, dtype=np.float32)
