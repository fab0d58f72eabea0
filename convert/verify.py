"""Is a GGUF what its checkpoint says? The engine's logits held against Transformers', prompt by prompt.

Transformers runs in a child process in float32, on weights rounded as the GGUF stores them, teacher-forced.
The engine runs the same tokens twice, as one prompt and token by token. Files of F32, F16 and BF16
must agree to `Thresholds.relative_error` with the same likeliest token. A quantised file is held against
its own 16-bit file by KL divergence, and that one against Transformers; without it, against Transformers.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MobileError, ModelFormatError, UsageError
from ..gguf_header import GgufHeader, read_header
from ..gguf_info import GgufInfo, read_gguf_info
from ..memory import read_memory
from ..sizes import GIB, format_bytes
from ..threads import default_threads
from .children import ChildError, child_environment, run_child
from .verify_prompts import PROMPTS
from .verify_result import FAILED, NOT_VERIFIED, PASSED, Row, Thresholds, VerifyResult
from .verify_rows import kl_bound, loose_row, mean_kl, strict_row

if TYPE_CHECKING:
    from .verify_engine import EngineReference

Progress = Callable[[str, float], None]

EXACT_TYPES = frozenset({"F32", "F16", "BF16"})
MAX_TOKENS = 24
# What torch and Transformers take before any weight is there, and the logits and buffers.
_CHILD_OVERHEAD = 3 * GIB // 2


class NotVerifiedError(MobileError):
    """Transformers cannot be the reference: unknown family, no memory, no tokenizer."""


def can_verify() -> bool:
    """Whether torch and Transformers are installed; neither is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def verify(
    gguf: Path,
    checkpoint: Path,
    *,
    reference_gguf: Path | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
    stall_seconds: float = 1800,
    progress: Progress = lambda phase, done: None,
) -> VerifyResult:
    """Compare ``gguf`` with the Hugging Face ``checkpoint`` folder that it was made from; changes no file.

    reference_gguf: for a quantised file, the F32, F16 or BF16 file it was quantised from. tokens: ids to
    compare on in place of the fixed prompts (then the tokenizer is not compared). stall_seconds: how long
    Transformers may go without progress. What keeps Transformers from being the reference is a result of
    status ``not verified``. Raises ModelNotFoundError, ModelFormatError, UsageError for files that cannot be
    read, and what ``load`` raises.
    """
    subject = _Subject(gguf)
    exact = subject if subject.is_exact else _Subject(reference_gguf) if reference_gguf is not None else None
    if exact is not None and not exact.is_exact:
        raise UsageError(f"{reference_gguf} is not an F32, F16 or BF16 file: it cannot be the reference")
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint} is not a checkpoint folder: it has no config.json")
    with tempfile.TemporaryDirectory(prefix="mobile-gguf-verify-") as scratch:
        run = _Verification(subject, exact, Path(scratch), threads or default_threads()[0], progress)
        try:
            run.ask_transformers(checkpoint, tokens, max_tokens, stall_seconds)
        except NotVerifiedError as error:
            return VerifyResult(NOT_VERIFIED, (str(error),), facts=run.facts)
        return run.judge()


@dataclass
class _Subject:
    """A GGUF with the types of its tensors."""

    path: Path
    info: GgufInfo = field(init=False)
    types: dict[str, str] = field(init=False)
    n_parameters: int = field(init=False)
    bits_per_weight: float = field(init=False)

    def __post_init__(self) -> None:
        self.info = read_gguf_info(self.path)
        headers: list[GgufHeader] = [read_header(path) for path in self.info.files]
        tensors = [
            each for header in headers for each in header.tensors if not each.name.startswith("mobile.")
        ]
        self.types = {each.name: _type_name(each.type_id) for each in tensors}
        self.n_parameters = sum(math.prod(each.shape) for each in tensors)
        matrices = [each for each in tensors if sum(n > 1 for n in each.shape) > 1] or tensors
        weights = sum(math.prod(each.shape) for each in matrices)
        self.bits_per_weight = 8 * sum(each.n_bytes for each in matrices) / weights

    @property
    def is_exact(self) -> bool:
        """Whether every tensor has a type that float32 arithmetic reads without loss."""
        return set(self.types.values()) <= EXACT_TYPES

    @property
    def is_rounded(self) -> bool:
        """Whether the engine's own kernels would round activations."""
        return bool(set(self.types.values()) - {"F32"})


def _type_name(type_id: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(type_id).name
    except ValueError:
        return f"type {type_id}"


class _Verification:
    """One run: first Transformers in its child, then the engine; never both in memory."""

    def __init__(
        self, subject: _Subject, exact: _Subject | None, scratch: Path, threads: int, progress: Progress
    ) -> None:
        self.subject = subject
        self.exact = exact
        self.scratch = scratch
        self.threads = threads
        self.progress = progress
        self.answer: dict[str, Any] = {}
        self.limits = Thresholds(mean_kl=kl_bound(subject.bits_per_weight))
        self.rows: list[Row] = []
        self.reasons: list[str] = []
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {
            "file": subject.path.name,
            "architecture": subject.info.architecture,
            "types": sorted(set(subject.types.values())),
            "bits_per_weight": round(subject.bits_per_weight, 2),
        }

    def ask_transformers(
        self, checkpoint: Path, tokens: Sequence[Sequence[int]] | None, max_tokens: int, stall_seconds: float
    ) -> None:
        """Fill ``answer`` and the logits in ``scratch``; raises NotVerifiedError."""
        if not can_verify():
            raise NotVerifiedError(
                "torch and Transformers are not installed: pip install 'mobile-gguf[convert]'"
            )
        own_dtype, memory_bytes = plan_memory(self.subject.n_parameters, read_memory().available_bytes)
        self.facts["precision"] = "the checkpoint's weights, float32 products" if own_dtype else "float32"
        weights = self.exact or self.subject
        job = {
            "checkpoint": str(checkpoint),
            "prompts": list(PROMPTS),
            "ids": [list(map(int, each)) for each in tokens] if tokens is not None else None,
            "max_tokens": max_tokens,
            "out": str(self.scratch),
            "own_dtype": own_dtype,
            "tensors": self.exact.types if self.exact is not None else {},
            "architecture": weights.info.architecture,
            "n_layer": weights.info.n_layer,
            "n_expert_used": weights.info.n_expert_used,
        }
        request = {
            "jobs": [job], "memory_bytes": memory_bytes, "threads": self.threads,
            "stall_seconds": stall_seconds,
        }  # fmt: skip

        def on_event(event: dict[str, Any]) -> bool:
            if "result" in event:
                self.answer = event["result"]
            elif "phase" in event:
                self.progress(event["phase"], 0.6 * float(event["done"]))
            return False

        try:
            run_child(
                "mobile_gguf.convert.verify_child", request, what="running Transformers",
                environment=child_environment(), on_event=on_event,
            )  # fmt: skip
        except ChildError as error:
            raise NotVerifiedError(str(error)) from None
        if "not_verifiable" in self.answer or not self.answer:
            raise NotVerifiedError(self.answer.get("not_verifiable", "Transformers gave no answer"))
        self.facts["fixed_prompts"] = tokens is None
        self.facts["n_tokens"] = sum(len(each) for each in self.answer["ids"])
        n_experts = sum(layer.n_expert for layer in weights.info.expert_layers)
        self.facts["experts_reached"] = min(self.answer["experts_reached"], n_experts)
        self.facts["experts"] = n_experts

    def judge(self) -> VerifyResult:
        """Run the engine on what Transformers ran on, and compare."""
        loose: list[Row] = []
        if self.exact is not None:
            with self._engine(self.exact, precise=True) as engine:
                self._check_vocabulary(engine)
                self._judge_strictly(engine)
        if not self.subject.is_exact:
            with self._engine(self.subject, precise=False) as engine:
                if self.exact is None:
                    self._check_vocabulary(engine)
                    self.notes.append("no 16-bit file was given: KL is against Transformers")
                loose = list(self._judge_loosely(engine))
        self.rows += loose
        self.facts["mean_kl"] = mean_kl(loose)
        if mean_kl(loose) > self.limits.mean_kl:
            self.reasons.append(
                f"mean KL {mean_kl(loose):.2g} is over {self.limits.mean_kl:g} nats per token"
            )
        self._note_coverage()
        wrong = [row for row in self.rows if row.problem]
        if wrong:
            first = wrong[0]
            self.reasons.insert(
                0, f"{len(wrong)} of {len(self.rows)} runs differ, the first: prompt {first.prompt + 1} "
                f"{first.run}, {first.problem}",
            )  # fmt: skip
        self.progress("verified", 1.0)
        return VerifyResult(
            FAILED if self.reasons else PASSED, tuple(self.reasons), tuple(self.rows), self.limits,
            self.facts, tuple(self.notes),
        )  # fmt: skip

    def _engine(self, subject: _Subject, *, precise: bool) -> EngineReference:
        from .verify_engine import EngineReference

        n_ctx = max(len(each) for each in self.answer["ids"]) + 8
        return EngineReference(subject.path, n_ctx=n_ctx, threads=self.threads, precise=precise)

    def _runs(self, engine: EngineReference, what: str, start: float) -> Iterator[tuple[int, str, Any]]:
        """Prompt, kind of run and logits, for every prompt both ways."""
        prompts = self.answer["ids"]
        for index, prompt in enumerate(prompts):
            share = start + 0.2 * index / len(prompts)
            self.progress(f"{what}: prompt {index + 1} of {len(prompts)}", share)
            yield index, "at once", engine.at_once(prompt)
            yield index, "step by step", engine.step_by_step(prompt)

    def _judge_strictly(self, engine: EngineReference) -> None:
        import numpy as np

        limits = self.limits
        if engine.is_rounded:
            self.notes.append(
                "this llama.cpp rounds activations to 16 bits: errors up to 5e-2 are let pass; build the "
                "engine (`mobile-gguf engine build`) for the strict comparison"
            )
            limits = self.limits = replace(limits, relative_error=5e-2, near_tie=1e-2)
        for index, run, logits in self._runs(engine, "the engine", 0.6):
            wanted = self._reference(index, logits.shape[1])
            if self.exact is not self.subject and run == "at once":
                np.save(self.scratch / f"exact-{index}.npy", logits)
            self.rows.append(strict_row(index, run, logits, wanted, self.answer["margins"][index], limits))
        near = sum(row.n_near_ties for row in self.rows)
        if near:
            self.notes.append(
                f"{near} tokens are off where a router's choice was a tie within {limits.near_tie:g}: excused"
            )
        if near > limits.flip_share * sum(row.n_tokens for row in self.rows):
            self.reasons.append("too many tokens are off where routers chose between equals")

    def _judge_loosely(self, engine: EngineReference) -> Iterator[Row]:
        import numpy as np

        against = "16-bit" if self.exact is not None else "Transformers"
        for index, run, logits in self._runs(engine, "the quantised file", 0.8):
            if self.exact is not None:
                wanted = np.load(self.scratch / f"exact-{index}.npy")
            else:
                wanted = self._reference(index, logits.shape[1])
            if wanted.shape != logits.shape:
                raise ModelFormatError(f"{self.subject.path} has another vocabulary than its 16-bit file")
            yield loose_row(index, run, against, logits, wanted)

    def _reference(self, index: int, n_vocab: int) -> Any:
        """Transformers' logits of a prompt, over the GGUF's vocabulary."""
        import numpy as np

        logits = np.load(self.scratch / f"{index}.npy")
        if logits.shape[1] < n_vocab:
            raise ModelFormatError(
                f"{self.subject.path} has a vocabulary of {n_vocab}, the checkpoint one of {logits.shape[1]}"
            )
        return logits[:, :n_vocab]

    def _check_vocabulary(self, engine: EngineReference) -> None:
        """Hold token ids and chat template against the checkpoint's; what differs is a reason to fail."""
        known = self.answer["tokenizer"]
        if known is None or not self.facts["fixed_prompts"]:
            why = self.answer["tokenizer_error"] or "token ids were given"
            self.notes.append(f"the tokenizer is not compared: {why}")
            return
        for index, text in enumerate(PROMPTS):
            ours = engine.tokenize(text, add_special=False)
            theirs = known["plain"][index]
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
                self.reasons.append(
                    f"prompt {index + 1} has other tokens in the GGUF: {ours[at : at + 4]} for "
                    f"{theirs[at : at + 4]} at {at + 1}"
                )
            elif engine.tokenize(text, add_special=True) != known["full"][index] and index == 0:
                self.notes.append(
                    "the GGUF adds other tokens around a prompt than the checkpoint's tokenizer"
                )
        if (engine.chat_template or None) != (known["template"] or None):
            self.reasons.append("the GGUF's chat template is not the checkpoint's")

    def _note_coverage(self) -> None:
        reached, experts = self.facts["experts_reached"], self.facts["experts"]
        if reached < experts:
            self.notes.append(f"the prompts reach {reached} of {experts} experts ({reached / experts:.0%})")


def plan_memory(n_parameters: int, available_bytes: int) -> tuple[bool, int]:
    """Whether Transformers must keep the checkpoint's own 16-bit type, and the bytes it may take.

    Raises NotVerifiedError when not even that fits.
    """
    wide = 4 * n_parameters + _CHILD_OVERHEAD
    # One layer's experts are widened at a time; a sixteenth of the model is more than that.
    narrow = 2 * n_parameters + 4 * n_parameters // 16 + _CHILD_OVERHEAD
    if wide <= available_bytes:
        return False, available_bytes
    if narrow <= available_bytes:
        return True, available_bytes
    raise NotVerifiedError(
        f"Transformers would need {format_bytes(narrow)} of memory for this checkpoint, and "
        f"{format_bytes(available_bytes)} are free: verify it on a larger machine with "
        "`mobile-gguf verify`, or convert with --no-verify"
    )


def mark(gguf: Path, result: VerifyResult, progress: Progress = lambda phase, done: None) -> None:
    """Write the verdict into the file's metadata, in place of an older one; the tensors stay as they are.

    A file that was not verified only loses an older verdict.
    """
    from .gguf_file import update_gguf
    from .verify_result import KEY_PREFIX

    values = result.metadata()
    stored = read_header(gguf).metadata
    if values or any(name.startswith(KEY_PREFIX) for name in stored):
        update_gguf(gguf, set=values, drop=[KEY_PREFIX], progress=progress)
