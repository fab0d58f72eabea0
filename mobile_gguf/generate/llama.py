"""A loaded model as answers need it: llama.cpp's low-level functions, the texts in its context, who decodes.

Imported when a model is loaded: it needs llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp
from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE

from mobile_gguf.device.tier import DeviceTier
from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.experts import ContextExperts, Experts
from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.engine.loss import Buddies
from mobile_gguf.engine.rpc import context_loss
from mobile_gguf.engine.split import Split
from mobile_gguf.engine.structs import ModelInfo
from mobile_gguf.engine.warm import WarmSet
from mobile_gguf.errors import EngineError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.fit import Fit
from mobile_gguf.memory.spare import SpareMemory

from .constraint.matching import Constraint
from .constraint.table import TableReader
from .context.counted import Counted
from .context.decoder import Decoder
from .context.native import Native
from .context.pace import run_token
from .context.pooling import embed_tokens, file_pooling, longest_text
from .context.sampler import Sampler
from .context.sequence import TokenSequence
from .context.threads import FollowingThreads
from .form.guide import Guide
from .loss.auto import Auto
from .passes.corrections import Corrections
from .passes.costs import Meter
from .passes.head import Head
from .prompts.chat_prompt import ChatPrompts
from .prompts.gap import FillTokens
from .prompts.prompts_of_pairs import fill_tokens, pair_tokens
from .prompts.spoken import Spoken
from .schedule.scheduler import Scheduler
from .sessions.prefix_cache import PrefixCache
from .sessions.sessions import Sessions
from .speculation.draft_model import DraftModel
from .speculation.mtp_context import MtpContext
from .speculation.speculation import Speculation
from .text.vocabulary import Vocabulary


class MobileLlama(Counted, Spoken):
    """A model and a context whose single-token steps run little, big, or little with fallback.

    What decides that is the policy of the answer's sequence. As many answers as the context has sequences may
    be made at once, by tasks of ``scheduler``; ``in_turn``: with the results that each has alone. No clock
    says which passes are made where it ``is_deterministic``. Without an engine (a stock library), or for a
    model that it holds no experts of (``store`` is None), all is big.
    Decoding raises ExpertReadError or EngineError and leaves the object usable. In ``cache_bytes`` texts are
    kept that others have put out of the context, where memory is free beside ``planned_bytes`` for all else,
    within ``total_bytes`` if so many are promised; ``sessions`` keeps them when this is closed.
    ``options`` are Native's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        engine: Engine | None,
        devices: Sequence[Device] = (),
        n_ctx: int,
        cache_bytes: int = 0,
        planned_bytes: int = 0,
        total_bytes: int = 0,
        sessions: Sessions | None = None,
        n_sequences: int = 1,
        grows: bool = False,
        in_turn: bool = False,
        is_deterministic: bool = False,
        **options: Any,
    ) -> None:
        self.devices = tuple(devices)
        self.device: DeviceTier | None = None  # set by loading, when there are slot pools
        self.threads: FollowingThreads | None = None  # set by loading, where they follow the machine
        self.auto: Auto | None = None  # set by the first policy of mode auto
        self.warm: WarmSet | None = None  # set by loading, where it is on
        self.split: Split | None = None  # set by loading, where experts are not kept whole
        self.draft: DraftModel | None = None  # set by loading, where there is one
        self.why_no_mtp = ""  # set by loading, where the block for it was asked for
        self.corrections: Corrections = {}  # set by loading, those of a calibrated file
        self.fit: Fit | None = None  # set by loading, where it was planned
        self.store: ModelInfo | None = None
        self.engine: Engine | None = None  # while there is a store to ask it about
        self.has_engine = engine is not None
        self._seed = 0
        self.sessions = sessions
        cache = PrefixCache(cache_bytes, SpareMemory(planned_bytes, total_bytes).bytes_beside, sessions)
        self.native = Native(
            path, devices=self.devices, n_ctx=n_ctx, n_sequences=n_sequences, is_apart=in_turn, **options
        )
        try:
            self._set_up(path, engine)
            self.mtp = self._make_block(engine)
            self.scheduler = self._make_scheduler(n_ctx, cache, grows, in_turn)
            self.speculation = Speculation(self, is_deterministic)
        except BaseException:
            self.native.close()
            raise

    def _set_up(self, path: str | os.PathLike[str], engine: Engine | None) -> None:
        self.calls = GuardedCalls(engine, self.model, self.ctx)
        # llama.cpp does not notice that a server is gone once it has the memory.
        if self.devices and (lost := context_loss(self.ctx)):
            raise EngineError(f"{path} cannot be loaded: {lost}")
        store = engine.model_info(self.model) if engine is not None else None
        if store is not None and store.n_layer_moe > 0:
            self.store, self.engine = store, engine
        self.decoder = Decoder(self.native, self.calls, self.engine, bool(self.devices))
        self.decoder.row_exact = engine
        self.vocabulary = Vocabulary(self.calls, self.native.says("tokenizer.ggml.model") or "")
        self._tables = TableReader(self.calls, self.vocabulary)
        self._prompts = ChatPrompts(
            self,
            self.vocabulary,
            self.native.says("tokenizer.chat_template") or CHATML_CHAT_TEMPLATE,
            self._token_text(int(llama_cpp.llama_vocab_bos(self.native.vocab))),
            self._token_text(int(llama_cpp.llama_vocab_eos(self.native.vocab))),
            self.native.n_ctx,
            engine.path if engine is not None else "",
        )

    def _make_block(self, engine: Engine | None) -> MtpContext | None:
        if engine is None or self.native.block is None:
            return None
        self.decoder.mtp = MtpContext(self.native, engine)
        return self.decoder.mtp

    def _make_scheduler(self, n_ctx: int, cache: PrefixCache, grows: bool, in_turn: bool) -> Scheduler:
        numbers = range(self.native.n_sequences)
        return Scheduler(
            self.decoder,
            [TokenSequence(self.decoder, n_ctx, cache, number) for number in numbers],
            Meter(self.traffic, self.count_anew),
            n_expert_used=self.store.n_expert_used if self.store is not None else 1,
            in_turn=in_turn,
            grows=grows,
        )

    @property
    def sequence(self) -> TokenSequence:
        """The one of the answer that runs, or ran last."""
        return self.scheduler.sequence

    def seated(
        self, prompt: Sequence[int], only_big: bool
    ) -> contextlib.AbstractContextManager[TokenSequence]:
        """The sequence that an answer to ``prompt`` is made in; ``only_big``: it builds on no other rows."""
        return self.scheduler.seated(prompt, only_big)

    @property
    def n_ubatch(self) -> int:
        """Tokens of a prompt that are computed at once."""
        return self.native.n_ubatch

    @property
    def context_tokens(self) -> int:
        """Tokens that a text may have."""
        return self.sequence.n_max

    @property
    def model(self) -> Any:
        """llama.cpp's address of the model."""
        return self.native.model

    @property
    def ctx(self) -> Any:
        """llama.cpp's address of the context."""
        return self.native.ctx

    def close(self) -> None:
        """Free the model and end the process that renders its template, once what was used is remembered and
        what was said is written."""
        self._prompts.close()
        self.scheduler.close()
        warm, self.warm = self.warm, None
        try:
            if not sys.is_finalizing():
                self.scheduler.end()
                if warm is not None:
                    warm.remember()
        finally:
            if self.draft is not None:
                self.draft.close()
            self.native.close()

    def __del__(self) -> None:
        if hasattr(self, "scheduler"):  # a load may have failed
            self.close()

    # generation

    def generate(
        self,
        tokens: Sequence[int],
        *,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Constraint | Guide | None = None,
        **sampling: Any,
    ) -> Generator[int, None, None]:
        """Continue ``tokens`` without an end; a token is run when the next one is asked for.

        Raises GrammarError where ``grammar`` leaves no token, or became too complex.
        """
        sequence = self.sequence
        with Sampler(self.calls.n_vocab, self._seed, logit_bias, **sampling) as sampler:
            self.speculation.expect(sequence)
            sequence.run_prompt(sequence.begin(tokens))
            sequence.drafting = self.speculation.of_answer(sequence, sampler, grammar)
            if sequence.drafting is not None:
                yield from sequence.drafting.tokens(tokens)
            while True:
                token = self.draw(sampler, grammar, sequence.row)
                yield token
                run_token(self, sequence, token)

    def draw(self, sampler: Sampler, grammar: Constraint | Guide | None, row: int) -> int:
        """A token of the logits in output ``row``, one that the grammar allows."""
        allowed = grammar.allowed() if grammar is not None else None
        if allowed is None:
            token = self.calls.sample(sampler.chain, row)
        else:
            token = self.calls.sample_among(sampler.chain, allowed, row)
        if grammar is not None:
            grammar.accept(token)
        return token

    def set_seed(self, seed: int) -> None:
        """The seed of the next generation."""
        self._seed = seed

    def forget(self) -> None:
        """Have the next prompt computed from its first token."""
        self.sequence.leave()

    def last_logits(self) -> Any:
        """The logits [n_vocab] of the answer's last pass. Raises UsageError if they are not at hand."""
        return self.sequence.last_logits()

    # embeddings

    @property
    def pooling(self) -> str | None:
        """How the file wants its states pooled into embeddings; None if it does not say."""
        return file_pooling(self.native)

    @property
    def can_generate(self) -> bool:
        """Whether the model continues texts; encoders keep nothing of what they have read."""
        return bool(self.native.memory)

    @property
    def embedding_limit(self) -> int:
        """Tokens of the longest text that can be embedded."""
        return longest_text(self.native)

    def embed_tokens(self, tokens: list[int], pooling: str) -> np.ndarray:
        """The pooled states of ``tokens``, float32 [n_embd]; the context is empty afterwards."""
        return embed_tokens(self.sequence, tokens, pooling)

    def pair_tokens(self, query: str, document: str) -> list[int]:
        """What a reranker is given of a pair."""
        return pair_tokens(self.native, self.tokenize, query, document)

    @property
    def fill_tokens(self) -> FillTokens | None:
        """The tokens by which the model fills gaps; None if it was not made for it."""
        return fill_tokens(self.native)

    # what a Model asks besides

    def experts(self, info: GgufInfo) -> Experts:
        """A live view of the experts; close it before this."""
        source = None
        if self.engine is not None and self.store is not None:
            has_device = self.device is not None
            source = ContextExperts(self.engine, self.model, self.ctx, self.store, has_device)
        return Experts(source, info.moe_layers, info.n_expert)

    @property
    def head(self) -> Head | None:
        """The model's importance head, which loading gives to the decoder."""
        return self.decoder.head

    @property
    def has_form(self) -> bool:
        """Whether the form of an answer, its thoughts and calls, is known of the model's chat template."""
        return self._prompts.has_form

    @property
    def buddies(self) -> Buddies | None:
        """The buddies of a calibrated file, which loading gives to the decoder."""
        return self.decoder.buddies

    @property
    def can_step_back(self) -> bool:
        """Whether single positions can be dropped from the memory; recurrent ones cannot."""
        return self.native.can_step_back

    def reset_counters(self) -> None:
        """Count anew, while no answer is made."""
        self.scheduler.restart_counters()

    def _token_text(self, token: int) -> str:
        return self.calls.text(token) if token >= 0 else ""
