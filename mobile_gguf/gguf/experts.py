"""Where a model's routed experts are in its tensor table: stacked, one tensor per expert, or in segments.

The engine makes the same checks (``patches/src/store/mobile-layout.cpp``); here they come first, and the byte
counts are what its expert store will take. The format: ``docs/format.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from mobile_gguf.errors import ModelFormatError

from . import keys
from .header import TensorInfo

FORMAT_VERSION = 1  # of mobile.* metadata; a newer one is refused
STACKED, PER_EXPERT = "stacked", "per-expert"  # layouts
# The coarsest alignment at which the expert store reads; finer ones need a little less memory.
STORE_ALIGNMENT = 4096
MAX_EXPERTS = 1 << 12  # GGML_EXPERT_MAX: what one tensor of the engine holds, segments counted

# an expert's matrices in the order in which they stand in a file; gate_up: gate and up rows in one
GATE_UP, UP, GATE, DOWN = MATRICES = ("gate_up", "up", "gate", "down")
# numbers as they are printed; the engine's reader has the same limits
_LAYER, _MATRIX, _NUMBER = r"blk\.(0|[1-9]\d{0,5})", f"ffn_({'|'.join(MATRICES)})", r"(0|[1-9]\d{0,5})"
_STACKED = re.compile(rf"{_LAYER}\.{_MATRIX}_exps\.weight")
_SINGLE = re.compile(rf"{_LAYER}\.{_MATRIX}\.{_NUMBER}\.weight")
_BESIDE = re.compile(r"blk\.\d+\.ffn_\w+_exps\.(?!weight$).+")
STACKED_PATTERN = rf"\.{_MATRIX}_exps\.weight$"  # for llama.cpp's quantiser, which searches


@dataclass(frozen=True)
class ExpertName:
    """What the name of a tensor of routed experts says; ``number`` None: all of a layer are in it.

    With segments ``number`` counts these: it is the expert's times how many there are, and the segment's.
    """

    layer: int
    matrix: str  # one of MATRICES
    number: int | None = None

    def __str__(self) -> str:
        which = "_exps" if self.number is None else f".{self.number}"
        return f"blk.{self.layer}.ffn_{self.matrix}{which}.weight"


def expert_name(tensor: str) -> ExpertName | None:
    """The tensor's name as one of routed experts' weights; None if it is another tensor."""
    if match := _SINGLE.fullmatch(tensor):
        return ExpertName(int(match[1]), match[2], int(match[3]))
    if match := _STACKED.fullmatch(tensor):
        return ExpertName(int(match[1]), match[2])
    return None


def is_beside_experts(tensor: str) -> bool:
    """Whether it holds the stacked experts' biases or scales."""
    return _BESIDE.fullmatch(tensor) is not None


class Named(Protocol):
    """A tensor, as far as its name goes."""

    @property
    def name(self) -> str: ...


AnyTensor = TypeVar("AnyTensor", bound=Named)


@dataclass
class SortedTensors(Generic[AnyTensor]):
    """A model's tensors: routed experts by layer and matrix, singles by number as well, and the rest."""

    stacked: dict[tuple[int, str], AnyTensor] = field(default_factory=dict)
    singles: dict[tuple[int, str], dict[int, AnyTensor]] = field(default_factory=dict)
    others: list[AnyTensor] = field(default_factory=list)

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the biases and scales that stand once per expert."""
        return tuple(tensor.name for tensor in self.others if is_beside_experts(tensor.name))


def sort_tensors(tensors: Iterable[AnyTensor]) -> SortedTensors[AnyTensor]:
    """Find the routed experts among a model's tensors, by their names."""
    found: SortedTensors[AnyTensor] = SortedTensors()
    for tensor in tensors:
        name = expert_name(tensor.name)
        if name is None:
            found.others.append(tensor)
        elif name.number is None:
            found.stacked[name.layer, name.matrix] = tensor
        else:
            found.singles.setdefault((name.layer, name.matrix), {})[name.number] = tensor
    return found


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's routed experts: how many, the bytes of each matrix of one, and how many pieces it is in."""

    n_expert: int
    matrix_bytes: tuple[int, ...]
    n_segments: int = 1

    @property
    def file_bytes(self) -> int:
        return self.n_expert * sum(self.matrix_bytes)

    def store_bytes(self, alignment: int = STORE_ALIGNMENT) -> int:
        """Memory for all of them in the expert store: a piece starts anywhere within its first block."""
        pieces = [n // self.n_segments for n in self.matrix_bytes]
        return (
            self.n_expert
            * self.n_segments
            * sum(-(-(n + alignment - 1) // alignment) * alignment for n in pieces)
        )


@dataclass(frozen=True)
class ExpertTable:
    """How a file holds its experts: its layout, into how many segments each is cut, and by layer."""

    layout: str
    n_segments: int
    layers: tuple[ExpertLayer, ...]
    numbers: tuple[int, ...]  # of these layers in the model


def read_experts(
    path: Path, metadata: dict[str, Any], tensors: Iterable[TensorInfo], n_layer: int, n_expert: int
) -> ExpertTable:
    """Find the experts of all tensors of a model, ``path`` being its (first) file.

    n_expert: what the model says it has. Raises ModelFormatError for a newer format, and for experts that
    are missing, unlike each other, or more than there are.
    """
    return _Reading(path, metadata, n_layer, n_expert).read(list(tensors))


class _Reading:
    def __init__(self, path: Path, metadata: dict[str, Any], n_layer: int, n_expert: int) -> None:
        self.path = path
        self.metadata = metadata
        self.n_layer = n_layer
        self.n_expert = n_expert

    def read(self, tensors: list[TensorInfo]) -> ExpertTable:
        n_segments = self.check_format()
        found = sort_tensors(tensors)
        ones, stacked = found.singles, found.stacked
        if n_segments > 1:
            self.check_segments(found.beside, bool(ones))
        # matrices of a layer, each as (number of experts, bytes of one)
        layers: dict[int, list[tuple[int, int]]] = {}
        for (layer, matrix), tensor in stacked.items():
            if (layer, matrix) in ones:
                self.fail(f"layer {layer}, ffn_{matrix}: the experts are there twice, stacked and one by one")
            n_expert = tensor.shape[2] if len(tensor.shape) > 2 else 1
            layers.setdefault(layer, []).append((n_expert, tensor.n_bytes // n_expert))
        for (layer, matrix), parts in ones.items():
            n_parts = self.check_parts(layer, matrix, parts, n_segments)
            layers.setdefault(layer, []).append((n_parts // n_segments, parts[0].n_bytes * n_segments))
        if layers and max(layers) >= self.n_layer:
            self.fail(f"it has experts in layer {max(layers)} but says it has {self.n_layer} layers")
        return ExpertTable(
            PER_EXPERT if ones else STACKED,
            n_segments,
            tuple(
                ExpertLayer(max(n for n, _ in matrices), tuple(size for _, size in matrices), n_segments)
                for _, matrices in sorted(layers.items())
            ),
            tuple(sorted(layers)),
        )

    def fail(self, reason: str) -> NoReturn:
        raise ModelFormatError(f"{self.path} cannot be used: {reason}")

    def number(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            self.fail(f"metadata {key} is {value!r:.60}")
        return value

    def check_format(self) -> int:
        """Version and layout; returns the number of segments."""
        version = self.number(keys.VERSION, FORMAT_VERSION)
        if version > FORMAT_VERSION:
            self.fail(f"{keys.VERSION} {version} is newer than {FORMAT_VERSION}; update mobile-gguf")
        layout = self.metadata.get(keys.LAYOUT, PER_EXPERT)
        if layout != PER_EXPERT:
            self.fail(
                f"{keys.LAYOUT} is {layout!r:.60}, which this version does not know; update mobile-gguf"
            )
        n_segments = self.number(keys.SEGMENTS, 1)
        if not 1 <= n_segments <= MAX_EXPERTS:
            self.fail(f"metadata {keys.SEGMENTS} is {n_segments}")
        return n_segments

    def check_segments(self, beside: tuple[str, ...], per_expert: bool) -> None:
        if not per_expert:
            self.fail(f"it has segments ({keys.SEGMENTS}) but no experts of their own")
        if beside:
            self.fail(f"{beside[0]}: experts with biases or scales cannot be in segments")

    def check_parts(self, layer: int, matrix: str, parts: dict[int, TensorInfo], n_segments: int) -> int:
        """How many parts (experts times segments) a matrix has, all there and alike."""
        where = f"layer {layer}, ffn_{matrix}"

        def part(number: int) -> str:
            expert = f"expert {number // n_segments}"
            return expert if n_segments == 1 else f"{expert}, segment {number % n_segments}"

        wanted = self.n_expert * n_segments or len(parts)
        missing = next((number for number in range(wanted) if number not in parts), None)
        if missing is not None:
            self.fail(f"{where}: {part(missing)} is missing; download or convert it again")
        if len(parts) > wanted:
            self.fail(f"{where}: {part(max(parts))} is there, in a model of {self.n_expert} experts")
        if len(parts) > MAX_EXPERTS:
            self.fail(f"{where}: {len(parts)} experts are more than the engine can route, {MAX_EXPERTS}")
        first = parts[0]
        for number, tensor in sorted(parts.items()):
            if (tensor.type_id, tensor.shape) != (first.type_id, first.shape):
                self.fail(f"{where}: {part(number)} has another type or shape than expert 0")
        if len(first.shape) != 2:
            self.fail(f"{where}: an expert is not a matrix but has the shape {first.shape}")
        return len(parts)
