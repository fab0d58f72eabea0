"""What the answers of a model share of drafting, and how each begins.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_cpp import llama_cpp

from mobile_gguf.options.words import AUTO, DRAFT, MTP, NGRAM, OFF

from ..constraint.matching import Constraint
from ..form.guide import Guide
from ..pace import run_token
from ..sampler import Sampler
from .draft_model import ModelSource
from .drafting import Drafting
from .little import LittleSource
from .mtp import MtpSource
from .mtp_context import MtpContext
from .source import LookupSource, Source
from .tuner import Tuner
from .watch import StepWatch

if TYPE_CHECKING:
    from ..llama import MobileLlama
    from ..sequence import TokenSequence


class Speculation:
    """Makes the Drafting of each answer of a model, by what the answers before it have taught ``tuner``.

    ``is_stated``: what passes take is not measured, so that the same run makes the same passes.
    """

    def __init__(self, llama: MobileLlama, is_stated: bool) -> None:
        self._llama = llama
        self._is_stated = is_stated
        self._is_apart = llama.native.is_apart  # each answer's tokens in passes of their own
        self.tuner = self.make_tuner()

    def make_tuner(self) -> Tuner:
        """One that knows the model and nothing of its answers."""
        llama, store, share = self._llama, self._llama.store, 1.0
        if store is not None:
            share = min(1.0, store.budget_bytes / store.budget_all_bytes)
        tuner = Tuner(share=share if self._is_stated else None)
        tuner.runs_again = not llama.native.can_step_back
        if store is not None and share < 1.0:
            assert llama.engine is not None
            n_all = store.n_layer_moe * store.n_expert * llama.engine.n_segments(llama.model)
            # half of what there is room for: the other half is of tokens before
            tuner.most_needs = n_all * share / 2
        return tuner

    def expect(self, sequence: TokenSequence) -> None:
        """The prompt of an answer comes: what its drafts need of it is kept."""
        if (block := self._llama.mtp) is None:
            return
        source = sequence.policy.speculate
        if source in (AUTO, MTP):
            # states of prompts change digits
            block.wanted[sequence.number] = source == MTP and not self._is_stated
        else:
            block.wanted.pop(sequence.number, None)

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
                self.tuner, llama.counters, lambda: llama_cpp.llama_synchronize(llama.ctx)
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
            n_answers=lambda: 1 if self._is_apart else max(1, scheduler.n_running),
            is_alone=lambda: scheduler.n_running <= 1,
            last_pass=lambda: scheduler.watch.last if scheduler.watch is not None else None,
        )

    def _sources(self, sequence: TokenSequence, sampler: Sampler) -> list[Source]:
        policy, llama = sequence.policy, self._llama
        if policy.speculate == OFF:
            return []
        if policy.speculate in (AUTO, NGRAM, MTP):
            found: list[Source] = []
            if policy.speculate != MTP:
                found.append(LookupSource(sequence.prediction))
            if policy.speculate != NGRAM and llama.mtp is not None:
                found.append(self._of_block(llama.mtp, sequence.number, sampler))
            return found
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

    def _of_block(self, block: MtpContext, number: int, sampler: Sampler) -> MtpSource:
        together = self._llama.scheduler.together
        return MtpSource(
            block, number, sampler, self._llama.is_end, lambda wanted: together.run(block.draft, wanted)
        )
