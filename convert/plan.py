"""What converting a checkpoint will do and cost, known before any weight is read."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, ModelFormatError
from mobile_gguf.sizes import format_bytes

from .gguf.data import FileRange, TensorPlan
from .gguf.file import GgufSource
from .gguf.layout import plan_mobile
from .hf.checkpoint import Checkpoint
from .hf.upstream import StackedPlan
from .options import ConvertOptions
from .quantize import ftypes
from .quantize.run import QuantizeReport, QuantizeRequest

_SOURCE_TYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f32"}


@dataclass(frozen=True)
class ConversionPlan:
    """Bytes of one conversion.

    ``stacked_bytes`` is the converter's output (an intermediate where it is quantised), ``quantised_bytes``
    what the quantiser makes of it (0: nothing), ``peak_bytes`` the size of all files that exist at once.
    """

    checkpoint: Checkpoint
    out: Path
    outtype: str
    converter_type: str
    n_tensors: int
    stacked_bytes: int
    quantised_bytes: int
    final_bytes: int
    peak_bytes: int
    free_bytes: int
    types: dict[str, int]
    warnings: tuple[str, ...]

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Name and value, for people."""
        kind = "safetensors" if self.checkpoint.tensors else "PyTorch .bin"
        rows = [
            ("architecture", f"{self.checkpoint.architecture}, {self.checkpoint.n_expert} experts"),
            ("source", f"{len(self.checkpoint.shards)} {kind} files, {format_bytes(self.checkpoint.n_bytes)}"
                       f" {self.checkpoint.dtype}".rstrip()),
        ]  # fmt: skip
        if self.quantised_bytes:
            rows.append(("intermediate", f"{self.converter_type}, {format_bytes(self.stacked_bytes)}"))
            types = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))
            rows.append(("types", types))
        rows.append(("result", f"{self.outtype}, about {format_bytes(self.final_bytes)}"))
        rows.append(("disk", f"needs {format_bytes(self.peak_bytes)}, {format_bytes(self.free_bytes)} free"))
        rows.extend(("note", warning) for warning in self.warnings)
        return tuple(rows)

    def as_json(self) -> dict[str, Any]:
        """More about the plan for ``--json``."""
        return {
            "architecture": self.checkpoint.architecture,
            "n_expert": self.checkpoint.n_expert,
            "outtype": self.outtype,
            "intermediate_type": self.converter_type if self.quantised_bytes else None,
            "source_bytes": self.checkpoint.n_bytes,
            "stacked_bytes": self.stacked_bytes,
            "tensor_types": self.types or None,
            "warnings": list(self.warnings),
        }


def resolve_outtype(outtype: str, checkpoint: Checkpoint) -> str:
    """``auto`` as the 16-bit type nearest to the weights': as the converter chooses, float16 for float32."""
    if outtype != "auto":
        return outtype
    named = _config_dtype(checkpoint)
    return "f16" if named in ("F16", "F32", "F64") else "bf16"


def converter_type(outtype: str, request: QuantizeRequest, checkpoint: Checkpoint) -> str:
    """What the converter writes: the result itself, or a type that holds every weight as it is."""
    if not request.is_needed:
        return outtype
    return _SOURCE_TYPES.get(_config_dtype(checkpoint), "bf16")


def _config_dtype(checkpoint: Checkpoint) -> str:
    """The weights' type; of .bin shards, which only torch can read, the one that config.json claims."""
    if checkpoint.dtype:
        return checkpoint.dtype
    config = checkpoint.config
    named = config.get("torch_dtype") or config.get("dtype")
    return {"float16": "F16", "bfloat16": "BF16"}.get(str(named), "F32")


def make_plan(
    checkpoint: Checkpoint,
    out: Path,
    options: ConvertOptions,
    request: QuantizeRequest,
    *,
    converter: str,
    stacked: StackedPlan,
    quantised: QuantizeReport | None,
    keeps_intermediate: bool,
) -> ConversionPlan:
    """The plan, from the converter's header and the quantiser's dry run.

    Raises ModelFormatError where the quantiser would have to quantise what is quantised already, and what
    ``layout.plan_mobile`` raises for experts that cannot be laid out as asked.
    """
    if quantised is not None and quantised.requantized:
        raise ModelFormatError(
            f"{checkpoint.folder}: {quantised.requantized[0]} and {len(quantised.requantized) - 1} more are"
            f" quantised already and {request.outtype} would quantise them again: keep them with"
            " --outtype mxfp4_moe, or --experts mxfp4"
        )
    quantised_bytes = quantised.n_bytes if quantised is not None else 0
    final, n_tensors = quantised_bytes or stacked.n_bytes, stacked.n_tensors
    copies = [stacked.n_bytes + quantised_bytes]
    if not options.stacked:
        types = quantised.types if quantised is not None else {}
        before = final + (stacked.n_bytes if quantised_bytes and keeps_intermediate else 0)
        final, n_tensors = _laid_out(stacked.header, types, options)
        copies.append(before + final)
    copies.append(2 * final)  # what verification found is written into a new copy of the file
    return ConversionPlan(
        checkpoint, out, request.outtype, converter, n_tensors, stacked.n_bytes, quantised_bytes, final,
        max(copies), shutil.disk_usage(_existing(out.parent)).free,
        dict(Counter(quantised.types.values())) if quantised is not None else {},
        tuple(quantised.warnings) if quantised is not None else (),
    )  # fmt: skip


def _laid_out(header: Path, types: dict[str, str], options: ConvertOptions) -> tuple[int, int]:
    """(bytes, tensors) of the per-expert file, planned on a header with the types that tensors will have."""
    with GgufSource.open(header) as source:
        source.tensors = tuple(_as_type(tensor, types.get(tensor.name)) for tensor in source.tensors)
        planned = plan_mobile(source, options.segments, options.segment_order)
        return planned.file_bytes, len(planned.tensors)


def _as_type(tensor: TensorPlan, name: str | None) -> TensorPlan:
    """The tensor as the quantiser will write it; its data is only as long as that, and never read."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if name is None or not isinstance(tensor.data, FileRange):
        return tensor
    kind = GGMLQuantizationType(ftypes.tensor_types()[name])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_bytes = math.prod(tensor.shape) // block * block_bytes
    data = FileRange(tensor.data.part, tensor.data.offset, n_bytes)
    return TensorPlan(tensor.name, tensor.shape, int(kind), data)


def check_disk(plan: ConversionPlan) -> None:
    """Raise MobileError if the disk of the output is too small for all that exists at once."""
    if plan.peak_bytes > plan.free_bytes:
        raise MobileError(
            f"cannot write {plan.out}: converting needs {format_bytes(plan.peak_bytes)} on its disk, which"
            f" has {format_bytes(plan.free_bytes)} free: free some space there, or choose another with -o"
        )


def default_output(source_name: str, folder: Path, outtype: str, *, stacked: bool) -> Path:
    """``NAME-OUTTYPE.mobile.gguf`` in ``folder``; ``NAME-OUTTYPE.gguf`` for a stacked file."""
    return folder / f"{source_name}-{outtype}{'' if stacked else '.mobile'}.gguf"


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder
