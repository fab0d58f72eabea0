"""Quantising a stacked GGUF with libllama's own quantiser, in a process of its own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, ModelFormatError, UsageError
from mobile_gguf.gguf.experts import STACKED_PATTERN
from mobile_gguf.gguf.header import read_header
from mobile_gguf.progress import Progress

from ..children import ChildError, child_environment, run_child
from ..meter import Meter
from ..options import ConvertOptions
from . import ftypes
from .imatrix import read_imatrix

MODULE = "mobile_gguf.convert.quantize.child"
# what the quantiser may keep of a tensor's rows: small enough for the memory limit, large enough for threads
MAX_BUFFER = 128 << 20


@dataclass(frozen=True)
class QuantizeRequest:
    """What the quantiser is to do.

    outtype: a name from ``ftypes.ftypes()``. types: (regular expression, tensor type), the first that matches
    counts. imatrix: a file or None.
    """

    outtype: str
    types: tuple[tuple[str, int], ...] = ()
    imatrix: Path | None = None
    pure: bool = False
    threads: int = 1

    @property
    def is_needed(self) -> bool:
        """False where the converter's own output is already the result."""
        direct = self.outtype in ("auto", *ftypes.FLOAT_TYPES)
        return not direct or bool(self.types) or self.pure or self.imatrix is not None


@dataclass
class QuantizeReport:
    """What the quantiser did, or in a dry run would do: bytes are rounded as it logs them.

    ``types`` are the tensors' types in the result, by name; ``warnings`` are its own.
    """

    n_tensors: int = 0
    n_bytes: int = 0
    types: dict[str, str] = field(default_factory=dict)
    requantized: list[str] = field(default_factory=list)
    needs_imatrix: bool = False
    warnings: list[str] = field(default_factory=list)


def request_from(options: ConvertOptions, threads: int) -> QuantizeRequest:
    """Check the options that concern quantising.

    Raises UsageError for unknown types, ModelNotFoundError or ModelFormatError for the importance matrix.
    """
    outtype = ftypes.read_outtype(options.outtype)
    types = [
        (_pattern(pattern), ftypes.read_tensor_type(name, "--tensor-type"))
        for pattern, name in options.tensor_types
    ]
    if options.experts:
        types.append((STACKED_PATTERN, ftypes.read_tensor_type(options.experts, "--experts")))
    if options.attention:
        types.append((ftypes.ATTENTION_PATTERN, ftypes.read_tensor_type(options.attention, "--attention")))
    if options.imatrix is not None:
        read_imatrix(options.imatrix)
    elif (name := ftypes.needs_imatrix(outtype, [type_id for _, type_id in types])) is not None:
        raise UsageError(f"{name} cannot be made without an importance matrix: give one with --imatrix FILE")
    return QuantizeRequest(outtype, tuple(types), options.imatrix, options.pure, threads)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise UsageError(f"--tensor-type {text!r} is no regular expression: {error}") from error
    return text


def check_imatrix_fits(imatrix: Path, names: set[str]) -> None:
    """Check that an importance matrix is of this model. Raises ModelFormatError."""
    if not names & read_imatrix(imatrix).values.keys():
        raise ModelFormatError(
            f"{imatrix} has no entry for any tensor of this model: it belongs to another one"
        )


def quantize(
    source: Path, out: Path, request: QuantizeRequest, *, progress: Progress, dry_run: bool = False
) -> QuantizeReport:
    """Quantise ``source`` into ``out`` (in a dry run only say what would come of it).

    Raises MobileError: the quantiser's own reason, a full disk, or an output that is not whole.
    """
    report = QuantizeReport()
    meter = Meter(progress, "quantising", source.stat().st_size)
    done = 0

    def on_event(event: dict[str, Any]) -> bool:
        nonlocal done
        if "tensor" in event:
            done += event["done"]
            report.n_tensors = event["n_tensors"]
            report.n_bytes += event["written"]
            report.types[event["name"]] = event["target"].lower()
            if event["source"] != event["target"] and event["source"] not in ftypes.FLOAT_TYPES:
                report.requantized.append(event["name"])
            meter.update(event["tensor"], event["n_tensors"], done)
        elif "warning" in event:
            if "require an imatrix" in event["warning"]:
                report.needs_imatrix = True
            elif "fallback" in event["warning"] and "tensor(s)" in event["warning"]:
                report.warnings.append(event["warning"])
        return False

    try:
        run_child(
            MODULE, _job(source, out, request, dry_run),
            what="the quantiser", environment=child_environment(), on_event=on_event,
        )  # fmt: skip
    except ChildError as error:
        raise _explained(error, request, out) from error
    if dry_run:
        report.n_bytes += read_header(source).data_start  # the metadata, which the quantiser does not count
    else:
        _check_whole(out, report)
    return report


def _job(source: Path, out: Path, request: QuantizeRequest, dry_run: bool) -> dict[str, Any]:
    types = list(request.types)
    base = "bf16" if request.outtype == "auto" else request.outtype
    file_type = None
    if base in ftypes.FLOAT_TYPES and types:
        # libllama hears overrides only on the way to a quantised type: it gets one, and a rule for the rest
        types.append((".", ftypes.tensor_types()[base]))
        file_type, base = ftypes.ftypes()[base], "q8_0"
    metadata: list[tuple[str, int | str]] = []
    if request.imatrix is not None:
        matrix = read_imatrix(request.imatrix)
        metadata.append(("quantize.imatrix.file", request.imatrix.name))
        if matrix.dataset:
            metadata.append(("quantize.imatrix.dataset", matrix.dataset))
        metadata.append(("quantize.imatrix.entries_count", len(matrix.values)))
        if matrix.n_chunks > 0:
            metadata.append(("quantize.imatrix.chunks_count", matrix.n_chunks))
    return {
        "source": str(source), "out": str(out), "ftype": ftypes.ftypes()[base], "types": types,
        "file_type": file_type, "metadata": metadata, "imatrix": str(request.imatrix or ""),
        "pure": request.pure, "threads": request.threads, "dry_run": dry_run, "max_buf_size": MAX_BUFFER,
    }  # fmt: skip


def _explained(error: ChildError, request: QuantizeRequest, out: Path) -> MobileError:
    text = str(error)
    if "imatrix" in text and request.imatrix is None:
        return UsageError(f"{request.outtype} needs an importance matrix for this model: give --imatrix FILE")
    if "iostream error" in text or "basic_ios" in text:
        return MobileError(f"cannot write {out}: the disk is full or failed: free some space there")
    if "regex" in text.lower():
        return UsageError(f"libllama does not understand a --tensor-type pattern: {text}")
    return MobileError(f"libllama's quantiser: {text}")


def _check_whole(out: Path, report: QuantizeReport) -> None:
    """The quantiser does not see every failed write: the file says whether all of it is there."""
    try:
        header = read_header(out)
    except MobileError as error:
        raise MobileError(f"cannot write {out}: the disk is full or failed: free some space there") from error
    if len(header.tensors) != report.n_tensors:
        raise MobileError(f"the quantiser wrote {len(header.tensors)} of {report.n_tensors} tensors to {out}")
    report.n_bytes = header.file_bytes
    with out.open("rb") as file:
        os.fsync(file.fileno())
