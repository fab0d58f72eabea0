"""The engine's runs held against Transformers' answer: rows, notes and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mobile_gguf.errors import ModelFormatError

from .engine import EngineReference
from .prompts import PROMPTS
from .reference import Reference
from .result import FAILED, PASSED, Row, Thresholds, VerifyResult
from .rows import kl_bound, loose_row, mean_kl, strict_row
from .subject import Subject

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

# Where activations are rounded to 16 bits, routers choose other experts, and logits move by this much.
_ROUNDED_ERROR, _ROUNDED_TIE = 5e-2, 1e-2
_STOCK_NOTE = (
    "this llama.cpp rounds activations to 16 bits, so errors up to 5e-2 pass: build the engine "
    "(`mobile-gguf engine build`) for the strict comparison"
)


class Judge:
    """One file's comparison; ``exact`` is held against Transformers strictly, ``subject`` is the file."""

    def __init__(
        self,
        subject: Subject,
        exact: Subject | None,
        reference: Reference,
        threads: int,
        progress: Callable[[str, float], None],
        *,
        compare_tokens: bool,
    ) -> None:
        self.subject = subject
        self.exact = exact
        self.reference = reference
        self.threads = threads
        self.progress = progress
        self.compare_tokens = compare_tokens
        self.limits = Thresholds(mean_kl=kl_bound(subject.bits_per_weight))
        self.rows: list[Row] = []
        self.reasons: list[str] = []
        self.notes: list[str] = []

    def judge(self) -> VerifyResult:
        """Run the engine on what Transformers ran on, and compare.

        A file that the engine refuses has failed. Raises BudgetError and EngineError, which are not its
        fault.
        """
        loose: list[Row] = []
        try:
            if self.exact is not None:
                with self._engine(self.exact, precise=True) as engine:
                    self._judge_strictly(engine)
                    if self.exact is self.subject:
                        self._compare_tokenizers(engine)
            if self.exact is not self.subject:
                with self._engine(self.subject, precise=False) as engine:
                    self._compare_tokenizers(engine)
                    loose += self._judge_loosely(engine)
        except ModelFormatError as error:
            self.reasons.append(str(error))
        self.rows += loose
        kl = mean_kl(loose)
        if kl > self.limits.mean_kl:
            self.reasons.append(f"mean KL {kl:.2g} is over {self.limits.mean_kl:g} nats per token")
        self._explain_rows()
        self._note_coverage()
        self.progress("verified", 1.0)
        return VerifyResult(
            FAILED if self.reasons else PASSED, tuple(self.reasons), tuple(self.rows), self.limits,
            self._facts(kl), tuple(self.notes),
        )  # fmt: skip

    def _engine(self, subject: Subject, *, precise: bool) -> EngineReference:
        n_ctx = max(len(prompt) for prompt in self.reference.ids) + 8
        return EngineReference(subject.path, n_ctx=n_ctx, threads=self.threads, precise=precise)

    def _runs(self, engine: EngineReference, what: str, start: float) -> Iterator[tuple[int, str, Logits]]:
        """Prompt, kind of run and logits, for every prompt both ways."""
        prompts = self.reference.ids
        for index, prompt in enumerate(prompts):
            self.progress(f"{what}: prompt {index + 1} of {len(prompts)}", start + 0.2 * index / len(prompts))
            yield index, "at once", engine.at_once(prompt)
            yield index, "step by step", engine.step_by_step(prompt)

    def _judge_strictly(self, engine: EngineReference) -> None:
        import numpy as np

        if self.exact is not None and self.exact.is_rounding and not engine.is_precise:
            self.notes.append(_STOCK_NOTE)
            self.limits = replace(self.limits, relative_error=_ROUNDED_ERROR, near_tie=_ROUNDED_TIE)
        limits = self.limits
        for index, run, logits in self._runs(engine, "the engine", 0.6):
            if self.exact is not self.subject and run == "at once":
                np.save(self._exact_logits(index), logits)
            wanted = self._wanted(index, logits)
            margins = self.reference.margins[index]
            self.rows.append(strict_row(index, run, logits, wanted, margins, limits))
        near = sum(row.n_near_ties for row in self.rows)
        if near:
            self.notes.append(
                f"{near} tokens are off after a router's choice that was a tie within {limits.near_tie:g}"
            )
        if near > limits.flip_share * sum(row.n_tokens for row in self.rows):
            self.reasons.append("too many tokens are off after a tie between experts")

    def _judge_loosely(self, engine: EngineReference) -> Iterator[Row]:
        import numpy as np

        if self.exact is None:
            self.notes.append("no 16-bit file was given: KL is against Transformers")
        for index, run, logits in self._runs(engine, "the quantised file", 0.8):
            if self.exact is None:
                yield loose_row(index, run, "Transformers", logits, self._wanted(index, logits))
                continue
            wanted = np.load(self._exact_logits(index))
            if wanted.shape != logits.shape:
                raise ModelFormatError(f"{self.subject.path} has another vocabulary than {self.exact.path}")
            yield loose_row(index, run, "16-bit file", logits, wanted)

    def _exact_logits(self, index: int) -> Any:
        return self.reference.folder / f"exact-{index}.npy"

    def _wanted(self, index: int, logits: Logits) -> Logits:
        """Transformers' logits of a prompt, over the GGUF's vocabulary: a checkpoint's may be padded."""
        wanted = self.reference.logits(index)
        if wanted.shape[1] < logits.shape[1]:
            raise ModelFormatError(
                f"{self.subject.path} has a vocabulary of {logits.shape[1]}, its checkpoint one of "
                f"{wanted.shape[1]}"
            )
        return wanted[:, : logits.shape[1]]

    def _compare_tokenizers(self, engine: EngineReference) -> None:
        """Hold token ids and chat template against the checkpoint's; what differs is a reason to fail."""
        theirs = self.reference.tokenizer
        if theirs is None or not self.compare_tokens:
            why = self.reference.tokenizer_error or "token ids were given"
            self.notes.append(f"the tokenizer is not compared: {why}")
            return
        for index, text in enumerate(PROMPTS):
            if difference := _first_difference(
                engine.tokenize(text, add_special=False), theirs["plain"][index]
            ):
                self.reasons.append(f"prompt {index + 1} has other tokens in the GGUF: {difference}")
        if difference := _first_difference(engine.tokenize("", add_special=True), theirs["added"]):
            self.notes.append(f"the GGUF adds other tokens to a prompt than the checkpoint: {difference}")
        if (engine.chat_template or None) != (theirs["template"] or None):
            self.reasons.append("the GGUF's chat template is not the checkpoint's")

    def _explain_rows(self) -> None:
        wrong = [row for row in self.rows if row.problem]
        if wrong:
            first = wrong[0]
            self.reasons.insert(
                0, f"{len(wrong)} of {len(self.rows)} runs differ, the first: prompt {first.prompt + 1} "
                f"{first.run}, {first.problem}",
            )  # fmt: skip

    def _note_coverage(self) -> None:
        reached, experts = self.reference.experts_reached, self._n_experts()
        if 0 < reached < experts:
            self.notes.append(f"the prompts reach {reached} of {experts} experts ({reached / experts:.0%})")

    def _n_experts(self) -> int:
        return sum(layer.n_expert for layer in self.subject.info.expert_layers)

    def _facts(self, kl: float) -> dict[str, Any]:
        return {
            "architecture": self.subject.info.architecture,
            "types": sorted(set(self.subject.types.values())),
            "bits_per_weight": round(self.subject.bits_per_weight, 2),
            "reference_precision": self.reference.precision,
            "n_tokens": sum(len(prompt) for prompt in self.reference.ids),
            "experts_reached": self.reference.experts_reached,
            "mean_kl": kl,
        }


def judge(
    subject: Subject,
    exact: Subject | None,
    reference: Reference,
    threads: int,
    compare_tokens: bool,
    progress: Callable[[str, float], None],
) -> VerifyResult:
    """One file's verdict, for a process of its own (``engine_task``)."""
    same = exact is not None and exact.path == subject.path
    return Judge(
        subject, subject if same else exact, reference, threads, progress, compare_tokens=compare_tokens
    ).judge()


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    """Where two token lists part, in words; empty if they do not."""
    if ours == theirs:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
    at = min(at, len(ours), len(theirs))
    return f"{ours[at : at + 4]} for {theirs[at : at + 4]} from token {at + 1} on"
