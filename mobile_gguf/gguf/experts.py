"""Where a model's routed experts are in its tensor table: stacked, one tensor per expert, or in segments.

The engine makes the same checks (``patches/src/store/mobile-layout.cpp``); here they come first, and the byte
counts are what its expert store will take. The format: ``docs/format.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mobile_gguf.errors import ModelFormatError

from .header import TensorInfo

FORMAT_VERSION = 1  # of mobile.* metadata; a newer one is refused
STACKED, PER_EXPERT = "stacked", "per-expert"  # layouts
OWN_PREFIX = "mobile."  # names of tensors that are ours and no part of the model
# The coarsest alignment at which the expert store reads; finer ones need a little less memory.
STORE_ALIGNMENT = 4096
MAX_EXPERTS = 1 << 12  # GGML_EXPERT_MAX: what one tensor of the engine holds, segments counted

_ALL = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
_ONE = re.compile(r"blk\.(0|[1-9]\d{0,5})\.ffn_(gate|up|down|gate_up)\.(0|[1-9]\d{0,5})\.weight")
_EXTRA = re.compile(r"blk\.\d+\.ffn_\w+_exps\.(?!weight$)")


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
        ones: dict[tuple[int, str], dict[int, TensorInfo]] = {}
        stacked: dict[tuple[int, str], TensorInfo] = {}
        for tensor in tensors:
            if match := _ONE.fullmatch(tensor.name):
                ones.setdefault((int(match[1]), match[2]), {})[int(match[3])] = tensor
            elif match := _ALL.fullmatch(tensor.name):
                stacked[int(match[1]), match[2]] = tensor
        if n_segments > 1:
            self.check_segments(tensors, bool(ones))
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
        version = self.number("mobile.version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            self.fail(f"mobile.version {version} is newer than {FORMAT_VERSION}; update mobile-gguf")
        layout = self.metadata.get("mobile.layout", PER_EXPERT)
        if layout != PER_EXPERT:
            self.fail(
                f"mobile.layout is {layout!r:.60}, which this version does not know; update mobile-gguf"
            )
        n_segments = self.number("mobile.segments", 1)
        if not 1 <= n_segments <= MAX_EXPERTS:
            self.fail(f"metadata mobile.segments is {n_segments}")
        return n_segments

    def check_segments(self, tensors: list[TensorInfo], per_expert: bool) -> None:
        if not per_expert:
            self.fail("it has segments (mobile.segments) but no experts of their own")
        extra = next((tensor.name for tensor in tensors if _EXTRA.match(tensor.name)), None)
        if extra is not None:
            self.fail(f"{extra}: experts with biases or scales cannot be in segments")

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
