"""Is a GGUF what its checkpoint says? The engine's logits held against Transformers', prompt by prompt.

Transformers runs in a child process in float32, on weights rounded as the GGUF stores them, teacher-forced.
The engine, in another, runs the same tokens twice, as one prompt and token by token. Files of F32, F16 and
BF16 must agree to ``Thresholds.relative_error`` with the same likeliest token. A quantised file is held
against its own 16-bit file by KL divergence, and that one against Transformers; without it, against
Transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mobile_gguf.errors import UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.header import read_header
from mobile_gguf.memory.threads import default_threads
from mobile_gguf.progress import Progress, no_progress

from ..engine_task import EngineDiedError, in_child
from ..hf.checkpoint import read_json
from .hyperparameters import differences
from .judge import judge
from .reference import Question, ask_transformers, can_verify
from .result import FAILED, NOT_VERIFIED, VerifyResult
from .subject import Subject, read_subject

__all__ = ["MAX_TOKENS", "Pair", "can_verify", "mark", "verify", "verify_each"]

MAX_TOKENS = 24
STALL_SECONDS = 1800.0


@dataclass(frozen=True)
class Pair:
    """A GGUF and the Hugging Face checkpoint folder it was made from.

    reference_gguf: for a quantised file, the F32, F16 or BF16 file it was quantised from.
    """

    gguf: Path
    checkpoint: Path
    reference_gguf: Path | None = None


def verify(
    gguf: Path,
    checkpoint: Path,
    *,
    reference_gguf: Path | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
    stall_seconds: float = STALL_SECONDS,
    progress: Progress = no_progress,
) -> VerifyResult:
    """Compare ``gguf`` with the Hugging Face ``checkpoint`` folder that it was made from; changes no file.

    reference_gguf: for a quantised file, the F32, F16 or BF16 file it was quantised from. tokens: ids to
    compare on in place of the fixed prompts (then the tokenizer is not compared). max_tokens: of each fixed
    prompt. stall_seconds: how long Transformers may go without progress. What keeps Transformers from
    being the reference is a result of status ``not verified``, no error. Raises ModelNotFoundError,
    ModelFormatError, UsageError for files that cannot be read, and what ``load`` raises.
    """
    return verify_each(
        [Pair(gguf, checkpoint, reference_gguf)], tokens=tokens, max_tokens=max_tokens, threads=threads,
        stall_seconds=stall_seconds, progress=progress,
    )[0]  # fmt: skip


def verify_each(
    pairs: Sequence[Pair],
    *,
    tokens: Sequence[Sequence[int]] | None = None,
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
    stall_seconds: float = STALL_SECONDS,
    progress: Progress = no_progress,
) -> list[VerifyResult]:
    """``verify`` for several files, with one start of Transformers."""
    files = [_read(pair) for pair in pairs]
    ids = [[int(token) for token in each] for each in tokens] if tokens is not None else None
    n_threads = threads or default_threads()[0]
    with tempfile.TemporaryDirectory(prefix="mobile-gguf-verify-") as scratch:
        questions = []
        for number, (pair, (subject, exact)) in enumerate(zip(pairs, files, strict=True)):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            questions.append(Question(pair.checkpoint, subject, exact, folder, ids, max_tokens))
        references = ask_transformers(
            questions, threads=n_threads, stall_seconds=stall_seconds,
            progress=lambda phase, done: progress(phase, 0.6 * done),
        )  # fmt: skip
        results = []
        for pair, (subject, exact), reference in zip(pairs, files, references, strict=True):
            wrong = tuple(differences(subject.info, read_json(pair.checkpoint / "config.json")))
            if reference.reason:
                reasons = (*wrong, reference.reason)
                results.append(VerifyResult(FAILED if wrong else NOT_VERIFIED, reasons))
                continue
            task = (subject, exact, reference, n_threads, tokens is None)
            try:
                found = in_child(judge, *task, progress=progress)
                status = FAILED if wrong else found.status
                results.append(replace(found, status=status, reasons=(*wrong, *found.reasons)))
            except EngineDiedError as error:
                facts = {"architecture": subject.info.architecture}
                results.append(VerifyResult(FAILED, (*wrong, str(error)), facts=facts, engine_died=True))
    return results


def _read(pair: Pair) -> tuple[Subject, Subject | None]:
    """The file, and the one that is compared with Transformers strictly: itself, its 16-bit file, or none."""
    subject = read_subject(pair.gguf)
    if not (pair.checkpoint / "config.json").is_file():
        raise UsageError(f"{pair.checkpoint} is not a checkpoint folder: it has no config.json")
    if subject.is_exact:
        return subject, subject
    if pair.reference_gguf is None:
        return subject, None
    exact = read_subject(pair.reference_gguf)
    if not exact.is_exact:
        raise UsageError(f"{pair.reference_gguf} is not an F32, F16 or BF16 file: it cannot be the reference")
    return subject, exact


def mark(gguf: Path, result: VerifyResult, progress: Progress = no_progress) -> None:
    """Write the verdict into the file's metadata, in place of an older one; the tensors stay as they are.

    A file that was not verified only loses an older verdict. Raises what ``update_gguf`` raises.
    """
    from ..gguf.file import update_gguf

    values = result.metadata()
    if values or any(name.startswith(keys.VERIFY) for name in read_header(gguf).metadata):
        update_gguf(gguf, set=values, drop=[keys.VERIFY], progress=progress)
