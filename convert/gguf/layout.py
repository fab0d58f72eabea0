"""Between the stacked layout of stock files and ours, with a tensor for each expert: docs/format.md.

Tensors are only cut and joined, never decoded, so that no bit of a weight changes on the way or back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.files.atomic import free_bytes
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.experts import FORMAT_VERSION, PER_EXPERT
from mobile_gguf.progress import Progress, no_progress

from ..options import SEGMENT_ORDERS, ConvertResult
from .data import Kv, TensorPlan
from .experts import Experts, read_experts
from .file import GgufSource, gguf_bytes, write_gguf
from .segments import Neurons, check_segments, joined

ALIGNMENT = 4096

_ABOUT_LAYOUT = (keys.LAYOUT, keys.SEGMENTS, keys.SOURCE)
_MAX_ALIGNMENT = 1 << 20
_MAX_TENSORS = 1 << 20  # what a reader of ours accepts


@dataclass(frozen=True)
class FilePlan:
    """A file to write: everything but its name."""

    layout: str
    segments: int
    kv: tuple[Kv, ...]
    tensors: tuple[TensorPlan, ...]
    alignment: int

    @property
    def file_bytes(self) -> int:
        return gguf_bytes(self.kv, self.tensors, self.alignment)


def to_mobile(
    source: Path,
    out: Path,
    *,
    segments: int = 1,
    segment_order: str = "importance",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Write a GGUF in the per-expert layout, every expert cut into ``segments``.

    The source may be stacked, split, or per-expert with other segments. Raises UsageError when it is in that
    layout already, when it cannot be cut so, or when ``out`` exists and ``force`` is not given;
    ModelFormatError for a dense or damaged model; MobileError when the disk is too small or refuses.
    """
    with GgufSource.open(source) as opened:
        plan = plan_mobile(opened, segments, segment_order)
        return _write(opened, plan, Path(out), force, dry_run, progress)


def to_stacked(
    source: Path,
    out: Path,
    *,
    keep_mobile: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Write a GGUF as a stock file: experts stacked, ``mobile.*`` left out, alignment and order as they were.

    ``keep_mobile`` keeps calibration and verification, which the patched engine can load. Raises as
    ``to_mobile`` does.
    """
    with GgufSource.open(source) as opened:
        plan = plan_stacked(opened, keep_mobile=keep_mobile)
        return _write(opened, plan, Path(out), force, dry_run, progress)


def plan_mobile(source: GgufSource, segments: int = 1, segment_order: str = "importance") -> FilePlan:
    """Plan the per-expert file that ``to_mobile`` writes; raises as it does."""
    if segment_order not in SEGMENT_ORDERS:
        raise UsageError(f"segment order is {segment_order!r}: choose {' or '.join(SEGMENT_ORDERS)}")
    experts = read_experts(source)
    _check_new_layout(source, experts, segments, segment_order)
    by_importance = segments > 1 and segment_order == "importance"
    neurons = Neurons(source, experts, by_importance=by_importance)
    tensors = [tensor for tensor in experts.others if not tensor.name.startswith(keys.SEGMENT_ORDER_TENSOR)]
    if by_importance:
        tensors += neurons.order_tensors()
    for _, stacks in experts.layers():
        cuts = [
            (stack, stack.logical_shape(segments), tuple(neurons.pieces(stack, segments))) for stack in stacks
        ]
        tensors += [
            TensorPlan(stack.single_name(n), shape, stack.type_id, pieces[n])
            for n in range(stacks[0].n_expert * segments)
            for stack, shape, pieces in cuts
        ]
    if len(tensors) > _MAX_TENSORS:
        raise UsageError(f"{source.path} would have {len(tensors)} tensors: give fewer --segments")
    metadata = _mobile_metadata(source, experts, segments, segment_order)
    return FilePlan(PER_EXPERT, segments, metadata, tuple(tensors), ALIGNMENT)


def plan_stacked(source: GgufSource, *, keep_mobile: bool = False) -> FilePlan:
    """Plan the stacked file that ``to_stacked`` writes; raises as it does."""
    experts = read_experts(source)
    names = (*source.metadata, *(tensor.name for tensor in source.tensors))
    is_per_expert = any(stack.is_single for stack in experts.stacks)
    has_more = not keep_mobile and any(keys.is_ours(name) for name in names)
    if not is_per_expert and not has_more and len(source.parts) == 1:
        raise UsageError(f"{source.path} is a stacked file already: there is nothing to do")
    dropped = _ABOUT_LAYOUT if keep_mobile else (keys.PREFIX,)
    kv = tuple(kv for kv in source.kv if not kv.name.startswith(dropped))
    tensors = tuple(t for t in _stock_order(source, experts) if not t.name.startswith(dropped))
    return FilePlan("stacked", 1, kv, tensors, _source_alignment(source))


def stacked_tensors(source: GgufSource, experts: Experts) -> list[TensorPlan]:
    """The tensors of all experts as a stacked file has them, whatever the layout of ``source``."""
    neurons = Neurons(source, experts)
    return [
        TensorPlan(
            stack.stacked_name,
            (*stack.logical_shape(1), stack.n_expert),
            stack.type_id,
            joined(neurons.pieces(stack, 1)),
        )
        for stack in experts.stacks
    ]


def _write(
    source: GgufSource, plan: FilePlan, out: Path, force: bool, dry_run: bool, progress: Progress
) -> ConvertResult:
    source.check_target(out)
    if out.is_dir():
        raise UsageError(f"{out} is a directory: give a file for the output")
    if out.exists() and not force:
        raise UsageError(f"{out} exists: give another output, or --force to overwrite it")
    started = time.monotonic()
    n_bytes, free = plan.file_bytes, free_bytes(out)
    if not dry_run:
        write_gguf(out, plan.kv, plan.tensors, plan.alignment, progress, f"converting {source.path.name}")
    return ConvertResult(
        path=out,
        source=str(source.path),
        layout=plan.layout,
        segments=plan.segments,
        n_tensors=len(plan.tensors),
        n_bytes=n_bytes,
        peak_disk_bytes=n_bytes,
        free_bytes=free,
        seconds=time.monotonic() - started,
        dry_run=dry_run,
    )


def _check_new_layout(source: GgufSource, experts: Experts, segments: int, segment_order: str) -> None:
    if not experts.stacks:
        raise ModelFormatError(f"{source.path} is a dense model: it has no experts to lay out")
    order = source.metadata.get(keys.SEGMENT_ORDER)
    is_so = source.metadata.get(keys.LAYOUT) == PER_EXPERT and experts.segments == segments
    if is_so and (segments == 1 or order == segment_order):
        cut = "" if segments == 1 else f" with {segments} segments in {order} order"
        raise UsageError(f"{source.path} has the per-expert layout{cut} already: there is nothing to do")
    check_segments(source, experts, segments)


def _mobile_metadata(
    source: GgufSource, experts: Experts, segments: int, segment_order: str
) -> tuple[Kv, ...]:
    written: dict[str, Any] = {keys.VERSION: FORMAT_VERSION, keys.LAYOUT: PER_EXPERT}
    if source.metadata.get(keys.LAYOUT) != PER_EXPERT:  # else these are there, and about the stacked file
        written[keys.SOURCE_ALIGNMENT] = source.alignment
        if not any(stack.is_single for stack in experts.stacks):
            positions = [stack.position for stack in experts.stacks]
            written[keys.SOURCE_POSITIONS] = np.array(positions, np.uint32)
    if segments > 1:
        written |= {keys.SEGMENTS: segments, keys.SEGMENT_ORDER: segment_order}
    entries = {kv.name: kv for kv in source.kv if kv.name not in (keys.SEGMENTS, keys.SEGMENT_ORDER)}
    return _with(entries, written)


def _with(entries: Mapping[str, Kv], written: Mapping[str, Any]) -> tuple[Kv, ...]:
    return tuple((dict(entries) | {name: Kv.of(name, value) for name, value in written.items()}).values())


def _source_alignment(source: GgufSource) -> int:
    """What ``general.alignment`` the stacked file had, 0: none."""
    alignment = source.metadata.get(keys.SOURCE_ALIGNMENT, source.alignment)
    is_power = isinstance(alignment, int) and alignment >= 0 and not alignment & (alignment - 1)
    if isinstance(alignment, bool) or not is_power or alignment > _MAX_ALIGNMENT:
        raise ModelFormatError(
            f"{source.path} cannot be used: metadata {keys.SOURCE_ALIGNMENT} is {alignment!r:.60}"
        )
    return alignment


def _stock_order(source: GgufSource, experts: Experts) -> list[TensorPlan]:
    """All tensors, the stacked ones where they stood in the stock file, or behind the rest of their layer."""
    stacked = stacked_tensors(source, experts)
    own = [tensor for tensor in experts.others if keys.is_ours(tensor.name)]
    rest = [tensor for tensor in experts.others if not keys.is_ours(tensor.name)]
    positions = source.metadata.get(keys.SOURCE_POSITIONS)
    n_tensors = len(stacked) + len(rest)
    if not any(stack.is_single for stack in experts.stacks):
        positions = [stack.position for stack in experts.stacks]
    if _are_positions(positions, len(stacked), n_tensors):
        at = dict(zip(positions, stacked, strict=True))
        others = iter(rest)
        return [at[n] if n in at else next(others) for n in range(n_tensors)] + own
    last = {tensor.name.split(".")[1]: tensor.name for tensor in rest if tensor.name.startswith("blk.")}
    by_layer: dict[str, list[TensorPlan]] = {}
    for tensor in stacked:
        by_layer.setdefault(tensor.name.split(".")[1], []).append(tensor)
    ordered = []
    for tensor in rest:
        ordered.append(tensor)
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else ""
        if last.get(layer) == tensor.name:
            ordered += by_layer.pop(layer, [])
    return ordered + [tensor for tensors in by_layer.values() for tensor in tensors] + own


def _are_positions(positions: Any, n_stacked: int, n_tensors: int) -> TypeGuard[list[int]]:
    return (
        isinstance(positions, list)
        and len(set(positions)) == n_stacked == len(positions)
        and all(isinstance(n, int) and 0 <= n < n_tensors for n in positions)
    )
