"""What the answers of a model share of drafting, and how each begins.

Imported with llama-cpp-python, when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_cpp import llama_cpp

from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.words import AUTO, DRAFT, MTP, NGRAM, OFF

from ..constraint.matching import Constraint
from ..context.pace import run_token
from ..context.sampler import Sampler
from ..form.guide import Guide
from ..passes.decode import Policy
from .draft_model import ModelSource
from .drafting import Drafting
from .little import LittleSource
from .mtp import MtpSource
from .mtp_context import MtpContext
from .needs import most_needs, share_in_memory, token_needs
from .source import LookupSource, Source
from .stated import block_takes, model_takes
from .tuner import Tuner
from .watch import StepWatch

if TYPE_CHECKING:
    from ..context.sequence import TokenSequence
    from ..llama import MobileLlama


class Speculation:
    """Makes the Drafting of each answer of a model, by what the answers before it have taught ``tuner``.

    ``is_stated``: what passes take is not measured, so that the same run makes the same passes.
    """

    def __init__(self, llama: MobileLlama, is_stated: bool) -> None:
        self._llama = llama
        self._is_stated = is_stated
        self._is_apart = llama.native.is_apart  # each answer's tokens in passes of their own
        engine = llama.engine
        # of an expert, which are counted one by one
        self._n_segments = engine.n_segments(llama.model) if engine is not None else 1
        self._takes: dict[str, float] = {}
        self.tuner = self.make_tuner()

    def state(self, info: GgufInfo, small: GgufInfo | None = None) -> None:
        """What drafted tokens take by the model's file, and that of a smaller one, where no clock says it."""
        if info.n_layer_mtp:
            self._takes[MTP] = block_takes(info, share_in_memory(self._llama.store))
        if small is not None:
            self._takes[DRAFT] = model_takes(small, info)

    def make_tuner(self) -> Tuner:
        """One that knows the model and nothing of its answers."""
        tuner = Tuner(
            share=share_in_memory(self._llama.store) if self._is_stated else None, takes=self._takes
        )
        tuner.runs_again = not self._llama.native.can_step_back
        return tuner

    def _may_draft(self, policy: Policy) -> bool:
        """Whether memory has room for the experts of a draft, as it is now; the tuner is told of it."""
        store, tuner = self._llama.store, self.tuner
        if store is not None:
            tuner.most_needs = most_needs(store) * self._n_segments
            tuner.expect_needs(token_needs(store, policy) * self._n_segments)
        return tuner.may_draft()

    def expect(self, sequence: TokenSequence) -> None:
        """The prompt of an answer comes: what its drafts need of it is kept."""
        if (block := self._llama.mtp) is None:
            return
        policy = sequence.policy
        if policy.speculate in (AUTO, MTP) and self._may_draft(policy):
            # states of prompts change digits
            block.wanted[sequence.number] = policy.speculate == MTP and not self._is_stated
        else:
            block.wanted.pop(sequence.number, None)

    def of_answer(
        self, sequence: TokenSequence, sampler: Sampler, grammar: Constraint | Guide | None
    ) -> Drafting | None:
        """Drafts for the answer that is made in ``sequence``; None where its policy wants none, or has it
        be as is best and memory has no room for the experts of any. Without room none is looked for."""
        llama, scheduler = self._llama, self._llama.scheduler
        policy = sequence.policy
        has_room = policy.speculate != OFF and self._may_draft(policy)
        if not has_room and policy.speculate in (OFF, AUTO):
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
            self._sources(sequence, sampler),
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
