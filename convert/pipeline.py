"""A Hugging Face checkpoint to the final GGUF: check, plan, convert, quantise, lay out, verify, name.

Every step works in a hidden folder beside the output (``workdir``); the output's name appears last, when the
file is whole.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.trial import check_file
from mobile_gguf.errors import EngineError, MobileError, ModelFormatError, UsageError
from mobile_gguf.files.atomic import disk_errors
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.memory.threads import default_threads
from mobile_gguf.progress import Progress, no_progress

from .gguf.file import update_gguf
from .gguf.layout import to_mobile
from .hf import hub, upstream
from .hf.checkpoint import Checkpoint, read_checkpoint
from .options import ConvertOptions, ConvertResult
from .plan import ConversionPlan, check_disk, converter_type, default_output, make_plan, resolve_outtype
from .quantize.run import QuantizeRequest, check_imatrix_fits, quantize, request_from
from .verify.check import verify
from .verify.result import FAILED, NOT_VERIFIED, VerifyResult
from .workdir import work_directory

DEFAULTS = ConvertOptions()


def convert_checkpoint(
    source: str | Path,
    out: Path | None = None,
    options: ConvertOptions = DEFAULTS,
    *,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Convert the checkpoint ``source``, a folder or ``hf:org/repo``, to one GGUF of ours (or a stacked one).

    out: by default beside the folder, or in the working directory for the Hub, see ``default_output``.
    Raises MobileError and its kin, one line each; then nothing is left behind. A verification that fails
    raises nothing: the result says so.
    """
    started = time.monotonic()
    upstream.require_packages()
    threads = options.threads or default_threads()[1]
    request = request_from(options, threads)  # bad options before a long download
    converter = upstream.converter_dir(progress)
    if options.pre_tokenizer:
        upstream.check_pre_tokenizer(converter, options.pre_tokenizer)
    name = None
    if hub.is_checkpoint_reference(str(source)):
        name = hub.repository_name(str(source))
        folder = hub.fetch_checkpoint(str(source), with_code=options.trust_remote_code, progress=progress)
    else:
        folder = Path(source).expanduser()
    checkpoint = read_checkpoint(folder, upstream.known_architectures(converter))
    outtype = resolve_outtype(request.outtype, checkpoint)
    request = QuantizeRequest(outtype, request.types, request.imatrix, request.pure, threads)
    if out is None:
        place = Path.cwd() if name else folder.resolve().parent
        out = default_output(name or folder.resolve().name, place, outtype, stacked=options.stacked)
    out = Path(out).expanduser()
    _check_output(out, options)
    run = _Conversion(str(source), checkpoint, out, options, request, converter, name, progress)
    result = run.execute()
    return _timed(result, checkpoint, time.monotonic() - started)


class _Conversion:
    """One conversion, its inputs checked."""

    def __init__(
        self,
        source: str,
        checkpoint: Checkpoint,
        out: Path,
        options: ConvertOptions,
        request: QuantizeRequest,
        converter: Path,
        name: str | None,
        progress: Progress,
    ) -> None:
        self.source, self.checkpoint, self.out, self.options = source, checkpoint, out, options
        self.request, self.converter, self.name, self.progress = request, converter, name, progress
        self.verifies = options.verify if options.verify is not None else _can_verify()
        self.plan: ConversionPlan | None = None

    def execute(self) -> ConvertResult:
        """Do it all, or in a dry run plan it."""
        options = self.options
        kept = self._intermediate_path()
        if options.keep_intermediate and kept.exists() and not (options.force or options.dry_run):
            raise UsageError(f"{kept} exists, where --keep-intermediate would write: move it, or add --force")
        with self._folder() as work:
            stacked = work / "stacked.gguf"
            report = upstream.write_stacked(
                self.checkpoint.folder, stacked, self._converter_type(), converter=self.converter,
                threads=self.request.threads, name=self.name, pre_tokenizer=self.options.pre_tokenizer,
                trust_remote_code=self.options.trust_remote_code,
                no_mtp=self.options.no_mtp or self.checkpoint.lacks_mtp, on_plan=self._on_plan,
                progress=self.progress,
            )  # fmt: skip
            if report is None:
                return self._result(0, seconds={})
            seconds = {"convert": report.seconds}
            result = stacked
            if self.request.is_needed:
                began = time.monotonic()
                result = work / "quantised.gguf"
                quantize(stacked, result, self.request, progress=self.progress)
                seconds["quantise"] = time.monotonic() - began
            final, verification = self._finished(work, stacked, result, seconds)
            if options.keep_intermediate and final != stacked:
                os.replace(stacked, self._intermediate_path())
            n_bytes = final.stat().st_size
            os.replace(final, self.out)
            return self._result(n_bytes, seconds, verification)

    def _finished(
        self, work: Path, stacked: Path, result: Path, seconds: dict[str, float]
    ) -> tuple[Path, VerifyResult | None]:
        """The laid-out file, marked with what its verification found if that was asked for."""
        options = self.options
        if not options.stacked:
            began = time.monotonic()
            laid_out = work / "laid-out.gguf"
            to_mobile(
                result, laid_out, segments=options.segments, segment_order=options.segment_order,
                progress=_renamed(self.progress, f"converting {result.name}", "laying out the experts"),
            )  # fmt: skip
            if result != stacked or not options.keep_intermediate:
                result.unlink()
            result = laid_out
            seconds["lay out"] = time.monotonic() - began
        if not self.verifies:
            return result, None
        began = time.monotonic()
        found = self._verified(result, stacked if self.request.is_needed else None)
        if metadata := found.metadata():
            renamed = _renamed(self.progress, f"writing {result.name}", "noting the verification")
            update_gguf(result, metadata, progress=renamed)
        seconds["verify"] = time.monotonic() - began
        return result, found

    def _verified(self, result: Path, reference: Path | None) -> VerifyResult:
        try:
            return verify(
                result, self.checkpoint.folder, reference_gguf=reference, threads=self.request.threads,
                progress=self.progress,
            )  # fmt: skip
        except MobileError as error:  # the file took long to make, and nothing is known to be wrong with it
            return VerifyResult(NOT_VERIFIED, (str(error).replace(str(result), str(self.out)),))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Where the intermediates stand; a dry run writes nothing where the output would be."""
        if self.options.dry_run:
            with tempfile.TemporaryDirectory(prefix="mobile-gguf-plan-") as folder:
                yield Path(folder)
        else:
            with work_directory(self.out) as folder, disk_errors(self.out, remedy=""):
                yield folder

    def _converter_type(self) -> str:
        return converter_type(self.request.outtype, self.request, self.checkpoint)

    def _intermediate_path(self) -> Path:
        stem = self.out.name.removesuffix(".gguf").removesuffix(".mobile")
        return self.out.with_name(f"{stem}.{self._converter_type()}.gguf")

    def _on_plan(self, stacked: upstream.StackedPlan) -> bool:
        """From the header of the stacked file: what quantising will need, and whether the disk has it."""
        report = None
        if self.request.imatrix is not None:
            from mobile_gguf.gguf.header import read_header

            names = {tensor.name for tensor in read_header(stacked.header).tensors}
            check_imatrix_fits(self.request.imatrix, names)
        if self.request.is_needed:
            self.progress("planning the quantisation", 0.0)
            report = quantize(stacked.header, self.out, self.request, progress=no_progress, dry_run=True)
            if report.needs_imatrix and self.request.imatrix is None:
                raise UsageError(
                    f"{self.request.outtype} needs an importance matrix for this model: give --imatrix FILE"
                )
        try:
            check_result(stacked.header, self.checkpoint.folder, self.progress)
            self.plan = make_plan(
                self.checkpoint, self.out, self.options, self.request, converter=self._converter_type(),
                stacked=stacked, quantised=report,
                keeps_intermediate=self.options.keep_intermediate or self.verifies,
            )  # fmt: skip
        except MobileError as error:  # it names the file that is planned on, which the user never sees
            text = str(error).replace(str(stacked.header), str(self.checkpoint.folder))
            raise type(error)(text) from error
        if self.options.dry_run:
            return False
        check_disk(self.plan)
        return True

    def _result(
        self, n_bytes: int, seconds: dict[str, float], verification: VerifyResult | None = None
    ) -> ConvertResult:
        plan = self.plan
        if plan is None:
            raise UsageError("the converter ended before it had a plan")
        details = plan.as_json()
        if seconds:
            details["seconds_by_step"] = {step: round(value, 2) for step, value in seconds.items()}
        rows, exit_code = plan.rows(), 0
        if verification is not None:
            rows = (*rows, ("verification", verification.table()))
            details["verify"] = verification.as_dict()
            # one that was not asked for, and could not be made, is no failure
            failed = verification.status == FAILED or bool(self.options.verify)
            exit_code = verification.exit_code if failed else 0
        return ConvertResult(
            path=self.out, source=self.source, layout="stacked" if self.options.stacked else "per-expert",
            segments=self.options.segments, n_tensors=plan.n_tensors,
            n_bytes=n_bytes or plan.final_bytes,
            peak_disk_bytes=plan.peak_bytes, free_bytes=plan.free_bytes, dry_run=self.options.dry_run,
            rows=rows, details=details, exit_code=exit_code,
            verification=None if verification is None else verification.status,
        )  # fmt: skip


def check_result(header: Path, folder: Path, progress: Progress = no_progress) -> None:
    """Raise ModelFormatError if what the checkpoint in ``folder`` becomes cannot be loaded.

    ``header`` is the result, whole but for its tensors' data: enough for a trial, where there is an engine.
    """
    read_gguf_info(header)
    try:
        engine = find_engine()
    except EngineError:
        return
    if engine is None:
        return
    reason = check_file(engine, header, lambda: progress("trying the header", 0.0))
    if reason:
        raise ModelFormatError(f"{folder} cannot be converted: llama.cpp would not load the result: {reason}")


def _renamed(progress: Progress, hidden: str, shown: str) -> Progress:
    """Progress of a step that would name a file which the user never sees."""
    return lambda text, done: progress(text.replace(hidden, shown, 1), done)


def _check_output(out: Path, options: ConvertOptions) -> None:
    if out.is_dir():
        raise UsageError(f"{out} is a directory: name the file with -o")
    if out.exists() and not options.force and not options.dry_run:
        raise UsageError(f"{out} exists: choose another name with -o, or overwrite it with --force")


def _can_verify() -> bool:
    return importlib.util.find_spec("torch") is not None


def _timed(result: ConvertResult, checkpoint: Checkpoint, seconds: float) -> ConvertResult:
    """The result with the time all of it took, and the throughput over the checkpoint's bytes."""
    if result.dry_run:
        return replace(result, seconds=seconds)
    speed = checkpoint.n_bytes / 1e6 / max(seconds, 1e-9)
    rows = (*result.rows, ("throughput", f"{speed:.0f} MB/s of weights in {seconds:.0f} s"))
    details = {**(result.details or {}), "megabytes_per_second": round(speed, 1)}
    return replace(result, seconds=seconds, rows=rows, details=details)
