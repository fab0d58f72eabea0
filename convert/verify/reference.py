"""Asking Transformers, in a child process: what it needs, what may go wrong, what it answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_gguf.errors import MobileError, install_hint
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.progress import Progress
from mobile_gguf.sizes import GIB, format_bytes

from ..children import ChildError, child_environment, run_child
from .prompts import PROMPTS
from .subject import Subject

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CHILD_MODULE = "mobile_gguf.convert.verify.child"
# What torch and Transformers take before any weight is there, and the logits and buffers.
_CHILD_OVERHEAD = 3 * GIB // 2


class NotVerifiedError(MobileError):
    """Transformers cannot be the reference: unknown family, no memory, no tokenizer."""


@dataclass(frozen=True)
class Question:
    """One checkpoint to be run; ``weights`` is the GGUF whose rounding its weights get, None for none."""

    checkpoint: Path
    subject: Subject
    weights: Subject | None
    folder: Path  # empty; for the logits
    tokens: list[list[int]] | None
    max_tokens: int


@dataclass(frozen=True)
class Reference:
    """Transformers' answer; ``reason`` says why there is none.

    tokenizer: {plain, full: token ids of each prompt, added: those of an empty text, template}, or None and
    ``tokenizer_error``. margins: per prompt and token, the routers' smallest lead. experts_reached: (layer,
    expert) pairs; 0 if routers chose by other means than a top-k.
    """

    folder: Path
    reason: str = ""
    ids: Sequence[Sequence[int]] = ()
    tokenizer: dict[str, Any] | None = None
    tokenizer_error: str = ""
    margins: Sequence[Sequence[float]] = ()
    experts_reached: int = 0
    precision: str = ""

    def logits(self, prompt: int) -> npt.NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] of a prompt."""
        import numpy as np

        return np.load(self.folder / f"{prompt}.npy")


def can_verify() -> bool:
    """Whether torch and Transformers are installed; neither is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def ask_transformers(
    questions: Sequence[Question], *, threads: int, stall_seconds: float, progress: Progress
) -> list[Reference]:
    """Run every question in one child process; what fails is a Reference with a reason."""
    if not can_verify():
        reason = f"torch and Transformers are not installed: {install_hint('convert')}"
        return [Reference(question.folder, reason) for question in questions]
    available = read_memory().available_bytes
    answers: dict[int, Reference] = {}
    jobs: dict[int, dict[str, Any]] = {}
    for number, question in enumerate(questions):
        try:
            own_dtype = keeps_own_dtype(question.subject.n_parameters, available)
            jobs[number] = _job(question, own_dtype)
        except NotVerifiedError as error:
            answers[number] = Reference(question.folder, str(error))
    waiting = list(jobs)

    def on_event(event: dict[str, Any]) -> bool:
        if "result" in event and waiting:
            number = waiting.pop(0)
            answers[number] = _reference(questions[number], jobs[number], event["result"])
        elif "phase" in event:
            answered = len(jobs) - len(waiting)
            progress(str(event["phase"]), (answered + float(event["done"])) / (len(jobs) + 1))
        return False

    request = {
        "jobs": list(jobs.values()), "memory_bytes": available, "threads": threads,
        "stall_seconds": stall_seconds,
    }  # fmt: skip
    failure = "Transformers gave no answer"
    try:
        if jobs:
            run_child(
                CHILD_MODULE, request, what="running Transformers", environment=child_environment(),
                on_event=on_event,
            )  # fmt: skip
    except ChildError as error:
        failure = str(error)
    for number in waiting:
        answers[number] = Reference(questions[number].folder, failure)
    return [answers[number] for number in range(len(questions))]


def keeps_own_dtype(n_parameters: int, available_bytes: int) -> bool:
    """Whether Transformers must keep the checkpoint's own 16-bit type, because float32 does not fit.

    Raises NotVerifiedError when not even that fits.
    """
    # Of 16-bit weights a matrix is widened at a time; an eighth of the model in float32 is more than that.
    wide, narrow = (each * n_parameters + _CHILD_OVERHEAD for each in (4, 2.5))
    if wide <= available_bytes:
        return False
    if narrow <= available_bytes:
        return True
    raise NotVerifiedError(
        f"Transformers needs {format_bytes(int(narrow))} of memory for this checkpoint, and "
        f"{format_bytes(available_bytes)} are free: run `mobile-gguf verify` on a larger machine, or convert "
        "with --no-verify"
    )


def _job(question: Question, own_dtype: bool) -> dict[str, Any]:
    weights = question.weights
    info = (weights or question.subject).info
    return {
        "checkpoint": str(question.checkpoint),
        "prompts": list(PROMPTS),
        "ids": question.tokens,
        "max_tokens": question.max_tokens,
        "out": str(question.folder),
        "own_dtype": own_dtype,
        "tensors": weights.types if weights is not None else {},
        "architecture": info.architecture,
        "n_layer": info.n_layer,
        "n_expert_used": info.n_expert_used,
    }


def _reference(question: Question, job: dict[str, Any], result: dict[str, Any]) -> Reference:
    if "not_verifiable" in result:
        return Reference(question.folder, str(result["not_verifiable"]))
    return Reference(
        folder=question.folder,
        ids=result["ids"],
        tokenizer=result["tokenizer"],
        tokenizer_error=result["tokenizer_error"],
        margins=result["margins"],
        experts_reached=result["experts_reached"],
        precision="16-bit weights, float32 products" if job["own_dtype"] else "float32",
    )
