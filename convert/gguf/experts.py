"""Which tensors of a GGUF are routed experts, whatever its layout, and each expert's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.checks import MAX_LAYERS
from mobile_gguf.gguf.experts import DOWN, GATE, GATE_UP, MATRICES, MAX_EXPERTS, UP, ExpertName, sort_tensors
from mobile_gguf.gguf.header import type_block

from .data import FileRange, TensorPlan
from .file import GgufSource

_I32 = 26


@dataclass(frozen=True)
class Stack:
    """One matrix of all experts of a layer.

    ``pieces`` [n_piece] are the bytes of each expert, or of each segment; ``shape`` is one's, in ggml order;
    ``segments`` of them make an expert. ``position`` is where its first tensor stands among the model's
    (ours left out), ``is_single`` whether each piece is a tensor.
    """

    layer: int
    kind: str
    type_id: int
    shape: tuple[int, int]
    pieces: tuple[FileRange, ...]
    segments: int
    position: int
    is_single: bool

    @property
    def n_expert(self) -> int:
        return len(self.pieces) // self.segments

    @property
    def block(self) -> tuple[int, int]:
        """(elements, bytes) of a block of its type."""
        block = type_block(self.type_id)
        if block is None:
            raise ModelFormatError(f"tensor {self.stacked_name} has the unknown type {self.type_id}")
        return block

    @property
    def width(self) -> int:
        """Neurons of a piece."""
        if self.kind == DOWN:
            return self.shape[0]
        return self.shape[1] // (2 if self.kind == GATE_UP else 1)

    @property
    def stacked_name(self) -> str:
        return str(ExpertName(self.layer, self.kind))

    def single_name(self, number: int) -> str:
        return str(ExpertName(self.layer, self.kind, number))

    def logical_shape(self, segments: int) -> tuple[int, int]:
        """The shape of an expert's matrix when it is cut into ``segments``."""
        n_in, n_out = self.shape
        if self.kind == DOWN:
            return n_in * self.segments // segments, n_out
        return n_in, n_out * self.segments // segments


@dataclass(frozen=True)
class Experts:
    """All routed experts of a file, layers ascending and in a layer in the order of ``MATRICES``; and the
    rest.

    ``beside`` are the names of biases and scales that stand once per expert.
    """

    stacks: tuple[Stack, ...]
    others: tuple[TensorPlan, ...]
    beside: tuple[str, ...]
    segments: int

    def layers(self) -> Iterator[tuple[int, list[Stack]]]:
        by_layer: dict[int, list[Stack]] = {}
        for stack in self.stacks:
            by_layer.setdefault(stack.layer, []).append(stack)
        yield from by_layer.items()


def read_experts(source: GgufSource) -> Experts:
    """Find and check the routed experts of a file; there are none in a dense model.

    Raises ModelFormatError when experts are missing, or do not fit together or the metadata.
    """
    segments = _segments(source)
    found = sort_tensors(source.tensors)
    if both := found.stacked.keys() & found.singles.keys():
        _fail(source.path, f"layer {min(both)[0]} has its experts both stacked and one by one")
    of_model = (tensor.name for tensor in source.tensors if not keys.is_ours(tensor.name))
    position = {name: n for n, name in enumerate(of_model)}
    stacks = [_of_stacked(source.path, key, tensor, position) for key, tensor in found.stacked.items()]
    stacks += [_of_singles(source.path, key, ones, segments, position) for key, ones in found.singles.items()]
    stacks.sort(key=lambda stack: (stack.layer, MATRICES.index(stack.kind)))
    experts = Experts(tuple(stacks), tuple(found.others), found.beside, segments)
    for layer, own in experts.layers():
        _check_layer(source, layer, own)
    return experts


def _segments(source: GgufSource) -> int:
    segments = source.metadata.get(keys.SEGMENTS, 1)
    if not isinstance(segments, int) or isinstance(segments, bool) or not 1 <= segments <= MAX_EXPERTS:
        _fail(source.path, f"metadata {keys.SEGMENTS} is {segments!r:.60}")
    return segments


def _of_stacked(path: Path, key: tuple[int, str], tensor: TensorPlan, position: dict[str, int]) -> Stack:
    layer, kind = key
    n_in, n_out, n_expert = (*tensor.shape, 1, 1)[:3]
    if (len(tensor.shape) > 3 and tensor.shape[3] != 1) or layer >= MAX_LAYERS or n_expert > MAX_EXPERTS:
        _fail(path, f"tensor {tensor.name} has the shape {tensor.shape}: experts cannot")
    size = _expert_bytes(path, tensor, (n_in, n_out))
    data = _file_range(tensor)
    pieces = tuple(data.slice(i * size, size) for i in range(n_expert))
    return Stack(layer, kind, tensor.type_id, (n_in, n_out), pieces, 1, position[tensor.name], False)


def _of_singles(
    path: Path, key: tuple[int, str], found: dict[int, TensorPlan], segments: int, position: dict[str, int]
) -> Stack:
    layer, kind = key
    what = f"the {kind} matrices of layer {layer}"
    missing = next((number for number in range(len(found)) if number not in found), None)
    if missing is not None:
        _fail(path, f"{what} lack expert {missing}")
    if layer >= MAX_LAYERS or len(found) > MAX_EXPERTS or len(found) % segments:
        _fail(path, f"{what} are {len(found)}, which cannot be with {segments} segments")
    first = found[0]
    for tensor in found.values():
        if (tensor.type_id, tensor.shape) != (first.type_id, first.shape) or len(tensor.shape) > 2:
            _fail(path, f"{what} differ in type or shape: {first.name} and {tensor.name}")
    n_in, n_out = (*first.shape, 1)[:2]
    _expert_bytes(path, first, (n_in, n_out))
    pieces = tuple(_file_range(found[number]) for number in range(len(found)))
    return Stack(layer, kind, first.type_id, (n_in, n_out), pieces, segments, position[first.name], True)


def _expert_bytes(path: Path, tensor: TensorPlan, shape: tuple[int, int]) -> int:
    block = type_block(tensor.type_id)
    if block is None:
        _fail(path, f"tensor {tensor.name} has the unknown type {tensor.type_id}: update the gguf package")
    return shape[0] // block[0] * block[1] * shape[1]


def _check_layer(source: GgufSource, layer: int, stacks: list[Stack]) -> None:
    kinds = [stack.kind for stack in stacks]
    if kinds not in ([GATE_UP, DOWN], [UP, GATE, DOWN], [UP, DOWN]):
        _fail(
            source.path,
            f"the experts of layer {layer} have the matrices {', '.join(kinds)}: some are missing",
        )
    down = stacks[-1]
    n_embd = down.shape[1]
    expected = {"up": (n_embd, down.width), "gate": (n_embd, down.width), "gate_up": (n_embd, 2 * down.width)}
    for stack in stacks[:-1]:
        if stack.shape != expected[stack.kind] or len(stack.pieces) != len(down.pieces):
            _fail(
                source.path,
                f"the experts of layer {layer} do not fit together: {stack.kind} is"
                f" {len(stack.pieces)} of {stack.shape}, down is {len(down.pieces)} of {down.shape}",
            )
    claimed: Any = source.metadata.get(f"{source.metadata.get('general.architecture')}.expert_count")
    if claimed is not None and claimed != down.n_expert:
        _fail(source.path, f"layer {layer} has {down.n_expert} experts, expert_count says {claimed!r:.20}")


def stored_order(source: GgufSource, down: Stack) -> np.ndarray | None:
    """Which neuron of the stacked file stands at each place of a segmented one; int32 [n_expert, n_ff].

    None: the neurons stand as in the stacked file. Raises ModelFormatError if an expert's is no permutation.
    """
    name = f"{keys.SEGMENT_ORDER_TENSOR}{down.layer}"
    tensor = source.tensor(name)
    if tensor is None or down.segments == 1:
        return None
    n_ff = down.width * down.segments
    shape = (down.n_expert, n_ff)
    if tensor.type_id != _I32 or tuple(reversed(tensor.shape)) != shape:
        _fail(source.path, f"tensor {name} is not I32 {list(shape)}")
    order = source.array(name)
    if not np.array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(n_ff, dtype=np.int32), shape)):
        _fail(source.path, f"tensor {name} is no order of {n_ff} neurons")
    return order


def _file_range(tensor: TensorPlan) -> FileRange:
    if not isinstance(tensor.data, FileRange):
        raise TypeError(f"tensor {tensor.name} is not in a file")
    return tensor.data


def _fail(path: Path, reason: str) -> NoReturn:
    raise ModelFormatError(f"{path} cannot be used: {reason}")
