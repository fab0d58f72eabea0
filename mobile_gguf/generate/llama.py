"""llama-cpp-python's Llama with decode steps that follow a policy.

Everything above ``eval`` (sampling, prefix reuse) is llama-cpp-python's own; how a batch is run is ours, and
which tokens a grammar leaves to sample from. Imported when a model is loaded: it needs llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
from llama_cpp import Llama, llama_cpp
from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE

from mobile_gguf.device.tier import DeviceTier
from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.devices import Device, device_array
from mobile_gguf.engine.experts import ContextExperts, Experts
from mobile_gguf.engine.forks import abandon_in_children
from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.engine.log import clear_errors, last_errors
from mobile_gguf.engine.loss import Buddies, LossRules, loss_counters, set_buddies, set_loss, set_lossy
from mobile_gguf.engine.prefetch import prefetch_counters
from mobile_gguf.engine.rpc import context_loss
from mobile_gguf.engine.structs import (
    Counters,
    DeviceCounters,
    LossCounters,
    ModelInfo,
    PrefetchCounters,
    WarmCounters,
)
from mobile_gguf.engine.warm import WarmSet, warm_counters
from mobile_gguf.errors import AnswerStopped, EngineError, ExpertReadError, MobileError, UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.competition import Competition

from .chat_prompt import ChatPrompts
from .constraint.making import constraint_of
from .constraint.matching import Constraint
from .constraint.tokens import TokenTable
from .decode import ALL_EXPERTS, Pass, Policy, decode_prompt, decode_token
from .head import Head
from .interrupt import stopping_on_request
from .logit_bias import biased
from .pooling import clear_memory, file_pooling, has_memory, longest_text, pooled_state
from .threads import FollowingThreads
from .vocabulary import Vocabulary

_TEMPLATES = "tokenizer.chat_template"
# The engine keeps this much more memory for logits where those of a whole prompt are asked for.
_LOGITS_BYTES = 16 << 20
# While a vocabulary is read it is asked for whether to stop after so many tokens, some 20 ms.
_TOKENS_BETWEEN = 1024
# A prompt that is all in the context already is computed anew from here before its end.
_MIN_PROMPT = 2


class FileName(str):
    """A file's name that reaches C as it is: llama-cpp-python encodes it, and not every name is UTF-8."""

    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        """The name's bytes."""
        return super().encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


class MobileLlama(Llama):
    """A Llama whose single-token steps run little, big, or little with fallback.

    ``policy`` may be changed between generations. Without an engine (a stock library), or for a model
    that it holds no experts of (``store`` is None), every step is big. Decoding raises
    ExpertReadError or EngineError and leaves the object usable.
    """

    def __init__(
        self,
        model_path: str,
        *,
        engine: Engine | None,
        devices: Sequence[Device] | None = None,
        keep_loading: Callable[[float], bool] | None = None,
        **options: Any,
    ) -> None:
        self._keep_loading = keep_loading
        self.devices = tuple(devices or ())
        self._device_array = device_array(self.devices)
        self.device: DeviceTier | None = None  # set by loading, when there are slot pools
        self.threads: FollowingThreads | None = None  # set by loading, where they follow the machine
        self.warm: WarmSet | None = None  # set by loading, where it is on
        self.engine: Engine | None = None  # while there is a store to ask it about
        self.store: ModelInfo | None = None
        self.has_engine = engine is not None
        self.policy = Policy()
        self.last_pass = Pass.BIG
        self.prompt_evaluated = 0
        self.prompt_done = 0.0
        self.should_stop: Callable[[], bool] | None = None
        self.on_prompt: Callable[[int, int], object] | None = None
        self.on_logits: Callable[[int, Any], object] | None = None
        self._prompt_pending = False
        self._experts = ALL_EXPERTS
        self._loss: LossRules | None = None  # in force, and whether the next pass may lose by it
        self._is_lossy = False
        self.head: Head | None = None
        self.buddies: Buddies | None = None
        self._has_buddies = False  # the engine has been told
        self._keeps_state = False
        self._biases: Mapping[int, float] = {}
        self._constraint: Constraint | None = None
        self._token_table: TokenTable | None = None
        self._table_parts: tuple[list[bytes], set[int], set[int]] = ([], set(), set())
        # The position whose token comes next, if the last pass left its hidden state.
        self._state_at = -1
        self._template: str | None = None
        super().__init__(FileName(model_path), n_gpu_layers=-1 if devices else 0, **options)
        self.calls = GuardedCalls(engine, self.model, self.ctx)
        self._ctx.decode = self.calls.decode
        abandon_in_children(self)
        # llama.cpp does not notice that a server is gone once it has the memory.
        if self.devices and (lost := context_loss(self.ctx)):
            raise EngineError(f"{model_path} cannot be loaded: {lost}")
        self.vocabulary = Vocabulary(self.calls, self.metadata.get("tokenizer.ggml.model", ""))
        self._prompts = ChatPrompts(
            self,
            self.vocabulary,
            self._template or CHATML_CHAT_TEMPLATE,
            self._token_text(self.token_bos()),
            self._token_text(self.token_eos()),
            self.n_ctx(),
        )
        self._little_rows = np.zeros(self.input_ids.shape[0], dtype=bool)
        store = engine.model_info(self.model) if engine is not None else None
        if store is not None and store.n_layer_moe > 0:
            self.store, self.engine = store, engine

    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        """llama.cpp's load parameters, with our devices, and ``keep_loading`` as their progress callback."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        # Llama makes its parameters where no argument reaches these two. Without a list of devices llama.cpp
        # would take all there are, also RPC servers that another model of this process was loaded on.
        params.devices = ctypes.cast(self._device_array, ctypes.c_void_p)  # pyright: ignore
        if self._keep_loading is not None:
            keep_loading = self._keep_loading
            self._load_callback = llama_cpp.llama_progress_callback(lambda share, _data: keep_loading(share))
            params.progress_callback = self._load_callback
        self._model_params = params

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says, but for its chat templates: Llama would run them where it is made."""
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, str]) -> None:
        self._template = metadata.get(_TEMPLATES) or None
        self._metadata = {name: value for name, value in metadata.items() if not name.startswith(_TEMPLATES)}

    def close(self) -> None:
        """Free the model, and end the process that renders its template; what was used is remembered."""
        prompts = getattr(self, "_prompts", None)  # a load may have failed
        if prompts is not None:
            prompts.close()
        warm, self.warm = getattr(self, "warm", None), None
        try:
            if warm is not None and not sys.is_finalizing():
                warm.remember()
        finally:
            super().close()

    def _abandon(self) -> None:
        """In a forked child: what the parent loaded is not freed, for that would wait for its threads."""
        for stack in (self._stack, *(part._exit_stack for part in (self._batch, self._ctx, self._model))):
            stack.pop_all()

    # generation

    def generate(  # type: ignore[override]
        self,
        tokens: Sequence[int],
        *args: Any,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Constraint | None = None,
        **options: Any,
    ) -> Generator[int, Any, None]:
        """Llama.generate, whose first evaluation counts as the prompt however short it is.

        Raises GrammarError where ``grammar`` leaves no token, or became too complex.
        """
        self._prompt_pending = True
        self._biases = logit_bias or {}
        self._constraint = grammar
        if self.on_logits is not None:
            self.forget()  # it is shown those of all the prompt
        self._limit_reuse(list(tokens))
        try:
            yield from super().generate(tokens, *args, **options)
        finally:
            self._sampler = None
            self._biases = {}
            self._constraint = None
            self._prompt_pending = False

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        sampler = super()._init_sampler(*args, **options)
        return biased(sampler, self._biases, self._n_vocab) if self._biases else sampler

    def sample(self, *args: Any, idx: int | None = None, **options: Any) -> int:  # type: ignore[override]
        """A token of the last logits, one that the constraint of this answer allows."""
        sampler = self._sampler or self._init_sampler(*args, **options)
        if self._constraint is None:
            return self.calls.sample(sampler.sampler, idx - self.n_tokens if idx is not None else -1)
        token = self.calls.sample_among(sampler.sampler, self._constraint.allowed())
        self._constraint.accept(token)
        return token

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8 text; ``add_bos``: with what the model adds, ``special``: control tokens."""
        return self.calls.tokenize(text, add_bos, special)

    def _limit_reuse(self, prompt: list[int]) -> None:
        """Forget what an earlier answer left in the context and this prompt must not build on."""
        if self.policy.always_big and self._little_rows[: self.n_tokens].any():
            # Rows that a little pass wrote must not be reused for an exact answer.
            self.n_tokens = int(self._little_rows.argmax())
            self._requires_eval = True
        if self.last_pass is not Pass.BIG or self._is_lossy:
            # The logits at hand are not a big pass's, and the first token after a prompt is.
            self._requires_eval = True
        at_hand = not self._requires_eval and self._input_ids.tolist() == prompt
        if self.can_step_back and not at_hand and self.n_tokens > len(prompt) - _MIN_PROMPT:
            # One token alone runs through other kernels than a prompt does, and the last digits of its
            # logits differ: the same question with the same seed would get another answer.
            self.n_tokens = max(0, len(prompt) - _MIN_PROMPT)
            self._requires_eval = True

    def eval(self, tokens: Sequence[int]) -> None:
        """Run tokens at the next positions: several, or a prompt's, big; a single one as the policy says."""
        batch = list(tokens)
        is_prompt = self._prompt_pending or len(batch) != 1 or self.n_tokens == 0
        try:
            if is_prompt:
                self.last_pass = decode_prompt(self, batch)
                self.prompt_evaluated += len(batch)
            else:
                self.last_pass = self._decode_token(batch[0])
        except BaseException:
            # Also for Ctrl-C, which arrives when the engine returns: the rows that were counted are
            # good, the logits are not. A memory that cannot drop the other rows starts over.
            self._requires_eval = True
            if not self.can_step_back:
                self.reset()
            raise
        if is_prompt:
            self._prompt_pending = False
            self.prompt_done = time.perf_counter()

    def follow_machine(self) -> None:
        """Generate with fewer threads while others want the processors.

        Not with flash attention, which adds up in another order with another number: a seed must
        give one text. Nor with a device, whose own trials compare times.
        """
        limit = self.context_params.n_threads
        flash = self.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if limit > 1 and not flash and not self.devices:
            self.threads = FollowingThreads(
                limit,
                lambda n: llama_cpp.llama_set_n_threads(self.ctx, n, self.n_threads_batch),
                Competition(),
            )

    def _decode_token(self, token: int) -> Pass:
        if self.threads is not None:
            self.threads.before()
            kind = decode_token(self, token, self.policy)
            self.threads.after()
            return kind
        if self.device is None:
            return decode_token(self, token, self.policy)
        self.device.controller.before_step(self.policy.mode)
        started = time.perf_counter()
        kind = decode_token(self, token, self.policy)
        llama_cpp.llama_synchronize(self.ctx)
        self.device.controller.after_step(time.perf_counter() - started)
        return kind

    # decode.Decoder

    def use_experts(self, k: int) -> None:
        if self.engine is not None and k != self._experts:
            self.engine.set_n_expert_used(self.ctx, k)
            self._experts = k

    def use_loss(self, rules: LossRules | None) -> None:
        if self.engine is None:
            return
        if rules is not None and rules != self._loss:
            if rules.needs_buddies and self.buddies is not None and not self._has_buddies:
                set_buddies(self.engine, self.ctx, self.buddies)
                self._has_buddies = True
            set_loss(self.engine, self.ctx, rules)
            self._loss = rules
        if (rules is not None) != self._is_lossy:
            set_lossy(self.engine, self.ctx, rules is not None)
            self._is_lossy = rules is not None

    def forward(self, tokens: list[int]) -> None:
        start = self.n_tokens
        if start + len(tokens) > self._little_rows.shape[0]:
            raise UsageError(f"the context of {self._little_rows.shape[0]} tokens is full")
        clear_errors()
        # Asked for its hidden states, llama.cpp computes the logits of every token of a prompt: not there.
        self._keep_state(self.policy.uses_head and len(tokens) == 1)
        self._state_at = -1
        try:
            with self._interruptible() if len(tokens) > 1 else contextlib.nullcontext():
                self._eval_in_pieces(tokens)
        except RuntimeError as error:
            raise self.decode_error(error) from None
        self._little_rows[start : self.n_tokens] = self._experts != ALL_EXPERTS or self._is_lossy
        if self._keeps_state:
            self._state_at = self.n_tokens

    def _eval_in_pieces(self, tokens: list[int]) -> None:
        """Llama.eval, which decodes ``n_batch`` tokens at a time; of a prompt each time is told."""
        tell, show = (self.on_prompt, self.on_logits) if self._prompt_pending else (None, None)
        if tell is None and show is None:
            super().eval(tokens)
            return
        if tell is not None:
            tell(0, len(tokens))
        n = self.n_batch
        if show is not None:
            n = max(1, min(n, _LOGITS_BYTES // (4 * self._n_vocab)))
        for start in range(0, len(tokens), n):
            piece = tokens[start : start + n]
            if show is None:
                super().eval(piece)
            else:
                self._eval_showing(piece, show)
            if tell is not None:
                tell(start + len(piece), len(tokens))

    def _eval_showing(self, tokens: list[int], show: Callable[[int, Any], object]) -> None:
        """Llama.eval of one batch, of which the logits after every token are shown."""
        start, end = self.n_tokens, self.n_tokens + len(tokens)
        self._ctx.kv_cache_seq_rm(-1, start, -1)
        self._batch.set_batch(batch=tokens, n_past=start, logits_all=True)
        self._ctx.decode(self._batch)
        self.input_ids[start:end] = tokens
        self.n_tokens = end
        self._requires_eval = False
        for i in range(len(tokens)):
            show(start + i, self._logits(i))

    def _interruptible(self) -> contextlib.AbstractContextManager[None]:
        return stopping_on_request(self.ctx, self.should_stop)

    def _keep_state(self, keep: bool) -> None:
        if keep != self._keeps_state:
            llama_cpp.llama_set_embeddings(self.ctx, keep)
            self._keeps_state = keep

    def step_back(self) -> None:
        self.n_tokens -= 1
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            raise EngineError("this model's memory cannot be rolled back, which big-little needs")

    def prefetch_masked(self) -> None:
        if self.engine is not None:
            self.engine.prefetch_masked(self.ctx)

    def last_logits(self) -> Any:
        return self._logits(-1)

    def _logits(self, i: int) -> Any:
        logits = self._ctx.get_logits_ith(i)
        if not logits:
            raise UsageError("there are no logits: ask for a token first")
        return np.ctypeslib.as_array(logits, shape=(self._n_vocab,))

    def head_probability(self, token: int) -> float | None:
        if self.head is None or self._state_at != self.n_tokens:
            return None
        state = llama_cpp.llama_get_embeddings_ith(self.ctx, -1)
        if not state:
            return None
        return self.head.probability(np.ctypeslib.as_array(state, shape=self.head.weight.shape), token)

    def decode_error(self, error: RuntimeError) -> MobileError:
        """A failed decode as the engine explains it."""
        lost = context_loss(self.ctx) if self.devices else ""
        if lost:
            return EngineError(lost)
        reason = self.engine.context_error(self.ctx) if self.engine is not None else ""
        if reason:
            return ExpertReadError(reason)
        return EngineError(f"decoding failed: {last_errors() or error}")

    # embeddings

    @property
    def pooling(self) -> str | None:
        """How the file wants its states pooled into embeddings; None if it does not say."""
        return file_pooling(self)

    @property
    def can_generate(self) -> bool:
        """Whether the model continues texts; encoders do not."""
        return has_memory(self)

    @property
    def embedding_limit(self) -> int:
        """Tokens of the longest text that can be embedded."""
        return longest_text(self)

    def embed_tokens(self, tokens: list[int], pooling: str) -> np.ndarray:
        """The pooled states of ``tokens``, float32 [n_embd]; the context is empty afterwards."""
        self.use_loss(None)
        self.use_experts(ALL_EXPERTS)
        clear_errors()
        self._forget_all()
        self._keep_state(True)
        try:
            with self._interruptible():
                return pooled_state(self, tokens, pooling)
        except RuntimeError as error:
            raise self.decode_error(error) from None
        finally:
            self._keep_state(False)
            self._forget_all()

    def _forget_all(self) -> None:
        self.forget()
        self._state_at = -1
        clear_memory(self)

    # what a Model asks besides

    def experts(self, info: GgufInfo) -> Experts:
        """A live view of the experts; close it before this."""
        source = None
        if self.engine is not None and self.store is not None:
            has_device = self.device is not None
            source = ContextExperts(self.engine, self.model, self.ctx, self.store, has_device)
        return Experts(source, info.moe_layers, info.n_expert)

    @property
    def can_step_back(self) -> bool:
        """Whether single positions can be dropped from the memory; recurrent ones cannot."""
        return not (self._is_recurrent or self._is_hybrid)

    def counters(self) -> Counters:
        """The store's counters since the last reset; all zero without one."""
        return self.engine.counters(self.ctx) if self.engine is not None else Counters()

    def device_counters(self) -> DeviceCounters:
        """The device tier's counters since the last reset; all zero without one."""
        return self.device.counters() if self.device is not None else DeviceCounters()

    def prefetch_counters(self) -> PrefetchCounters:
        """What was read ahead since the last reset; all zero without a store."""
        return prefetch_counters(self.engine, self.ctx) if self.engine is not None else PrefetchCounters()

    def loss_counters(self) -> LossCounters:
        """What the lossy rules did since the last reset; all zero without a store."""
        return loss_counters(self.engine, self.ctx) if self.engine is not None else LossCounters()

    def warm_counters(self) -> WarmCounters:
        """What became of the warm set since the model was loaded; all zero without a store."""
        return warm_counters(self.engine, self.ctx) if self.engine is not None else WarmCounters()

    def reset_counters(self) -> None:
        if self.engine is not None:
            self.engine.reset_counters(self.ctx)

    def forget(self) -> None:
        """Drop the whole context, so that the next prompt is computed from its first token."""
        self.reset()
        self._requires_eval = True

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends an answer (any of the model's end-of-generation tokens)."""
        return self.calls.is_end(token)

    def piece(self, token: int, special: bool = False) -> bytes:
        """A token's bytes; control tokens are empty unless ``special``."""
        return self.calls.piece(token, special)

    def check_fits(self, text: bytes, n_tokens: int) -> None:
        """Raise PromptTooLongError for a text that cannot be so few tokens."""
        self.vocabulary.check_fits(text, n_tokens)

    def render_chat(
        self, messages: list[dict[str, Any]], *, special: bool = False, **values: Any
    ) -> list[int]:
        """Prompt tokens for ``messages`` by the GGUF's template, by ChatML if it has none.

        ``values`` (``tools``, ``enable_thinking``) are what the template may use besides. What is written in
        messages and values is text; ``special`` reads control tokens in it.
        Raises UsageError if the template refuses them, PromptTooLongError if they cannot fit.
        """
        return self._prompts.tokens(messages, values, special=special)

    def make_grammar(
        self, grammar: str | None, json_schema: Any, should_stop: Callable[[], bool] | None = None
    ) -> Constraint | None:
        """What an answer is to follow, of GBNF text or a JSON schema; raises UsageError if it cannot."""
        if grammar is None and json_schema is None:
            return None
        return constraint_of(self.token_table(should_stop), grammar, json_schema, should_stop)

    def token_table(self, should_stop: Callable[[], bool] | None = None) -> TokenTable:
        """What a grammar is matched against, read once: seconds for a large vocabulary.

        Raises AnswerStopped if ``should_stop`` ends it; what was read is kept.
        """
        if self._token_table is None:
            pieces, unused, ends = self._table_parts
            for token in range(len(pieces), self._n_vocab):
                if should_stop is not None and token % _TOKENS_BETWEEN == 0 and should_stop():
                    raise AnswerStopped("the answer was stopped while the vocabulary was read")
                pieces.append(self.piece(token, special=True))
                if self.calls.attributes(token) & llama_cpp.LLAMA_TOKEN_ATTR_UNUSED:
                    unused.add(token)
                if self.is_end(token):
                    ends.add(token)
            self._token_table = TokenTable(pieces, self.vocabulary.controls | unused, frozenset(ends))
        return self._token_table

    def prepare_constraints(self) -> None:
        """Make what the first answer under a grammar would wait for, and all threads with it."""
        if self.calls.has_tokenizer:
            self.token_table().tokenizer  # noqa: B018

    def _token_text(self, token: int) -> str:
        return self.calls.text(token) if token >= 0 else ""
