"""What the answers of a model share of drafting, and how each begins.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_cpp import llama_cpp

from mobile_gguf.options.words import AUTO, DRAFT, NGRAM, OFF

from ..constraint.matching import Constraint
from ..form.guide import Guide
from ..pace import run_token
from ..sampler import Sampler
from .draft_model import ModelSource
from .drafting import Drafting
from .little import LittleSource
from .source import LookupSource, Source
from .tuner import Tuner
from .watch import StepWatch

if TYPE_CHECKING:
    from ..llama import MobileLlama
    from ..sequence import TokenSequence


class Speculation:
    """Makes the Drafting of each answer of a model, by what the answers before it have taught ``tuner``."""

    def __init__(self, llama: MobileLlama) -> None:
        self._llama = llama
        self.tuner = Tuner()
        if (store := llama.store) is not None and store.budget_bytes < store.budget_all_bytes:
            assert llama.engine is not None
            n_all = store.n_layer_moe * store.n_expert * llama.engine.n_segments(llama.model)
            # half of what there is room for: the other half is of tokens before
            self.tuner.most_needs = n_all * store.budget_bytes / store.budget_all_bytes / 2

    def of_answer(
        self, sequence: TokenSequence, sampler: Sampler, grammar: Constraint | Guide | None
    ) -> Drafting | None:
        """Drafts for the answer that is made in ``sequence``; None where its policy wants none."""
        llama, scheduler = self._llama, self._llama.scheduler
        sources = self._sources(sequence, sampler)
        if not sources:
            if scheduler.n_running <= 1:
                scheduler.watch = None
            return None
        if scheduler.watch is None:
            scheduler.watch = StepWatch(
                self.tuner.costs, llama.counters, lambda: llama_cpp.llama_synchronize(llama.ctx)
            )
        self.tuner.begin()

        def cut(draft: list[int]) -> list[int]:
            ends = next((i + 1 for i, token in enumerate(draft) if llama.is_end(token)), len(draft))
            return draft[: ends if grammar is None else min(ends, grammar.n_fitting(draft))]

        return Drafting(
            self.tuner,
            sources,
            sequence,
            run_single=lambda token: run_token(llama, sequence, token),
            draw=lambda: llama.draw(sampler, grammar, sequence.row),
            cut=cut,
            n_answers=lambda: max(1, scheduler.n_running),
        )

    def _sources(self, sequence: TokenSequence, sampler: Sampler) -> list[Source]:
        policy, llama = sequence.policy, self._llama
        if policy.speculate == OFF:
            return []
        if policy.speculate in (AUTO, NGRAM):
            return [LookupSource()]
        if policy.speculate == DRAFT:
            assert llama.draft is not None
            return [ModelSource(llama.draft, sequence.number, sampler)]
        return [
            LittleSource(
                sequence,
                policy.little_k,
                sampler,
                lambda guessing, row: llama.calls.sample(guessing.chain, row),
                llama.is_end,
            )
        ]
