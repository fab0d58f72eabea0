"""The Python API: ``load`` a model, generate and chat with it."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mobile_gguf.engine.devices import Device
from mobile_gguf.errors import (
    AnswerStopped,
    EngineError,
    MobileError,
    UsageError,
    missing_package,
    shown,
)
from mobile_gguf.generate.answer.answer import INTERRUPTED, Answer, Chunk, Reply
from mobile_gguf.generate.answer.logprobs import PromptLogprobs, TokenLogprob
from mobile_gguf.generate.backend import Backend
from mobile_gguf.generate.passes.decode import Policy
from mobile_gguf.generate.request.policy import choose_policy
from mobile_gguf.generate.request.recommended import recommended
from mobile_gguf.generate.request.request import make_request, prompt_tokens, token_ids
from mobile_gguf.generate.schedule.crew import Crew
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.hub.resolve import is_at_hand, resolve_model
from mobile_gguf.memory.demand import context_size
from mobile_gguf.options import POLICY_OPTIONS, GenerateOptions, LoadOptions, make_options, takes
from mobile_gguf.options.bias import check_tokens
from mobile_gguf.options.opt import check_callables
from mobile_gguf.options.words import TRIM

from .context import ChatPrompt
from .drafts import open_both
from .embedding import Embedding, Score, embed, rank
from .hold import Hold
from .messages import Messages
from .prompts import chat_prompt, gap_prompt, tokenized
from .slots import Slots
from .stats import model_stats
from .words import Notice, speaks_python

if TYPE_CHECKING:
    from mobile_gguf.engine.experts import Experts
    from mobile_gguf.generate.sessions.sessions import Sessions
    from mobile_gguf.memory.fit import Fit

logger = logging.getLogger("mobile_gguf")

ShouldStop = Callable[[], bool] | None
OnChunk = Callable[[Chunk], object] | None
OnPrompt = Callable[[int, int], object] | None
OnLogits = Callable[[int, Any], object] | None


@takes(LoadOptions)
@speaks_python
def load(
    model: str | os.PathLike[str],
    *,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Model:
    """Load a model and return it ready to generate.

    ``model`` is a path to a GGUF, ``demo``, or a name from ``mobile-gguf list``. ``ram_budget`` bounds
    the memory for routed experts: bytes, ``512MiB``, ``2G``, ``40%`` of them, or ``auto``; ``vram_budget``
    the same on devices, or ``off``. ``mode`` is ``exact``, ``little`` or ``big-little``. ``progress`` is
    called with a phase and the share done while the demo model is built and while a model is read; what it
    raises ends that. The others are LoadOptions'.

    Raises ModelNotFoundError, ModelFormatError, BudgetError, UsageError, EngineError.
    """
    settings = make_options(LoadOptions, options)
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(f"model is {shown(model)}: it must be a path or a name")
    check_callables(progress=progress)
    try:
        path = resolve_model(model, progress)
        info = read_gguf_info(path)
        backend, notices = open_both(info, settings, progress)
    except ImportError as error:
        if (missing := missing_package(error)) is None:
            raise
        raise EngineError(missing) from None
    if Path(model).expanduser().is_dir() and os.fspath(model) != "demo":
        notices = [f"{model} is a folder: {path.name}, the only model in it, is used", *notices]
    n_ctx = getattr(backend, "context_tokens", None)  # not of a scripted one
    return Model(backend, info, settings, notices, n_ctx=n_ctx)


def check_model(model: str | os.PathLike[str], progress: Callable[[str, float], None] | None = None) -> None:
    """Raise what ``load`` would raise of the name and of the file's header, and load nothing.

    Without ``progress``, what would have to be built or fetched first is not looked at.
    """
    if progress is not None or is_at_hand(model):
        read_gguf_info(resolve_model(model, progress))


class Model:
    """A loaded model, used by one thread at a time; made by ``load``, freed by ``close``.

    ``defaults`` are the options of an answer that nothing else is asked for: the sampling settings of the
    file (``general.sampling.*``), else those that are declared.
    A second thread, or a second answer while one is still being streamed, gets a ModelBusyError.
    ``mode``, ``gamma`` and ``little_k`` may be set between answers, and with ``configure`` what else
    decides which experts a token uses. ``notices`` holds what could not be
    done as asked; each was also logged as a warning of the logger ``mobile_gguf``.
    """

    info: GgufInfo
    options: LoadOptions
    notices: list[str]
    defaults: GenerateOptions
    n_ctx: int

    def __init__(
        self,
        backend: Backend,
        info: GgufInfo,
        options: LoadOptions,
        notices: Iterable[str] = (),
        *,
        n_ctx: int | None = None,
    ) -> None:
        self.info = info
        self.options = options
        self.notices = []
        # what answers follow where nothing else is asked for: the file's own sampling settings, then ours
        self.defaults = make_options(GenerateOptions, recommended(info)[0])
        self.n_ctx = n_ctx or context_size(info, options.n_ctx)
        for notice in notices:
            self._notify(notice)
        try:
            self._policy = choose_policy(options, info, backend, self._notify)
            self._hold = Hold(backend, info)
        except BaseException:
            backend.close()
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name.startswith("_") or name in self.__annotations__ or hasattr(type(self), name)):
            near = difflib.get_close_matches(name, ("mode", "gamma", "little_k"), 1)
            hint = f"; did you mean {near[0]}?" if near else ": mode, gamma and little_k can be set"
            raise UsageError(f"a Model has no attribute {name!r}{hint}")
        super().__setattr__(name, value)

    # settings

    @property
    def path(self) -> Path:
        return self.info.path

    @property
    def mode(self) -> str:
        """The mode in effect: ``exact`` where the model has no experts to leave out."""
        return self._policy.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self.configure(mode=mode)

    @property
    def gamma(self) -> float:
        return self._policy.gamma

    @gamma.setter
    def gamma(self, gamma: float) -> None:
        self.configure(gamma=gamma)

    @property
    def little_k(self) -> int:
        """Routed experts of a little token."""
        return self._policy.little_k

    @little_k.setter
    def little_k(self, little_k: int | None) -> None:
        self.configure(little_k=little_k)

    @speaks_python
    def configure(self, **changes: Any) -> None:
        """Set which tokens are big, and what becomes of missing experts, for the answers to come.

        An answer that has begun goes on as it began. Raises UsageError or EngineError.
        """
        for name in changes:
            if name not in POLICY_OPTIONS:
                raise UsageError(f"{name} cannot be configured: only {', '.join(POLICY_OPTIONS)} can")
        options = make_options(LoadOptions, changes, self.options)
        self._policy = self._make_policy(options)
        self.options = options

    def _make_policy(self, options: LoadOptions) -> Policy:
        return choose_policy(options, self.info, self._require_open(), self._notify)

    def _notify(self, text: str) -> None:
        notice = Notice(text)
        if notice not in self.notices:
            self.notices.append(notice)
            logger.warning(notice)

    # answers

    @takes(GenerateOptions)
    @speaks_python
    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        should_stop: ShouldStop = None,
        on_prompt: OnPrompt = None,
        on_logits: OnLogits = None,
        prediction: str | None = None,
        **options: Any,
    ) -> Generator[Chunk, None, None]:
        """Continue ``prompt``, text or token ids, yielding a Chunk per token.

        Closing the generator ends the answer, and so does ``should_stop`` when it returns True: it is asked
        before every token and, while a prompt is computed, after every operation. ``on_prompt`` is called
        with the prompt's tokens done and to do, as they are computed. ``on_logits`` is called with the place
        of every prompt token and the logits [n_vocab] after it, which are good until it returns: no part of
        the prompt is taken from the context then. ``prediction`` is text that much of the answer may be, such
        as a file that is to be edited: with ``speculate`` it is drafted from. Raises UsageError,
        ModelBusyError, GrammarError, ExpertReadError, EngineError; a failed answer leaves the Model usable.
        """
        settings = make_options(GenerateOptions, options, self.defaults)
        answer = self._answer(self._prompt(prompt), settings, should_stop, on_prompt, on_logits, prediction)
        return self._hold.stream(answer)

    @takes(GenerateOptions)
    @speaks_python
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        on_chunk: OnChunk = None,
        should_stop: ShouldStop = None,
        on_prompt: OnPrompt = None,
        on_logits: OnLogits = None,
        prediction: str | None = None,
        **options: Any,
    ) -> Reply:
        """Continue ``prompt`` and return the whole Reply; raises as ``stream`` does, the error with the Reply
        so far as its ``reply``.

        ``on_chunk`` is called with every Chunk. Ctrl-C or ``should_stop`` return the text so far, with
        ``finish_reason`` ``interrupted``.
        """
        settings = make_options(GenerateOptions, options, self.defaults)
        answer = self._answer(self._prompt(prompt), settings, should_stop, on_prompt, on_logits, prediction)
        return self._join(answer, on_chunk)

    @speaks_python
    def prompt_logprobs(
        self, prompt: str | Sequence[int], *, n_top: int = 0, should_stop: ShouldStop = None
    ) -> tuple[TokenLogprob, ...]:
        """How likely ``prompt`` is to the model, with all experts: a TokenLogprob for each of its tokens.

        ``n_top``: with the likeliest so many at each place. The first token has no log probability. Raises as
        ``generate`` does, and AnswerStopped where ``should_stop`` ended it.
        """
        if not isinstance(n_top, int) or isinstance(n_top, bool) or n_top < 0:
            raise UsageError(f"n_top is {shown(n_top)}: it must be a whole number of at least 0")
        tokens = self._prompt(prompt)
        if not tokens:
            raise UsageError("the prompt is empty")
        made = PromptLogprobs(self, tokens, n_top)
        reply = self.generate(tokens, max_tokens=0, on_logits=made, should_stop=should_stop)
        if reply.finish_reason == INTERRUPTED:
            raise AnswerStopped("the prompt was not computed to its end")
        return tuple(made.tokens)

    @takes(GenerateOptions)
    @speaks_python
    def stream_chat(
        self,
        messages: Messages,
        *,
        special: bool = False,
        should_stop: ShouldStop = None,
        on_prompt: OnPrompt = None,
        **options: Any,
    ) -> Generator[Chunk, None, None]:
        """Answer ``messages`` by the model's chat template, yielding a Chunk per token.

        ``messages`` are dicts with ``role`` and ``content``, oldest first; a string is one of the user's.
        Control tokens in them are text, unless ``special`` is true. What earlier answers have in common with
        them is not computed again. With ``context_full="trim"`` the oldest turns are left out where the
        context has no room for all: the receipt says how many. Raises as ``stream`` does.
        """
        settings = make_options(GenerateOptions, options, self.defaults)
        prompt = self._chat(messages, settings, special)
        return self._hold.stream(self._answer(prompt, settings, should_stop, on_prompt))

    @takes(GenerateOptions)
    @speaks_python
    def chat(
        self,
        messages: Messages,
        *,
        special: bool = False,
        on_chunk: OnChunk = None,
        should_stop: ShouldStop = None,
        on_prompt: OnPrompt = None,
        **options: Any,
    ) -> Reply:
        """Answer ``messages``, as ``stream_chat``, and return the whole Reply, as ``generate``."""
        settings = make_options(GenerateOptions, options, self.defaults)
        prompt = self._chat(messages, settings, special)
        return self._join(self._answer(prompt, settings, should_stop, on_prompt), on_chunk)

    def _predicted(self, text: str | None) -> list[int]:
        """The tokens of what an answer may be, as many as the context could have."""
        return self.tokenize(text, special=False)[: self.n_ctx] if text else []

    def _prompt(self, prompt: str | Sequence[int]) -> ChatPrompt:
        return prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(self.prompt_tokens(prompt))

    def _chat(self, messages: Messages, options: GenerateOptions, special: bool) -> ChatPrompt:
        trim = options.context_full == TRIM
        values = {"enable_thinking": False} if options.reasoning_budget == 0 else {}
        return self.chat_prompt(messages, special=special, trim=trim, max_tokens=options.max_tokens, **values)

    def _answer(
        self,
        prompt: ChatPrompt,
        options: GenerateOptions,
        should_stop: ShouldStop,
        on_prompt: OnPrompt,
        on_logits: OnLogits = None,
        prediction: str | None = None,
    ) -> Answer:
        check_callables(should_stop=should_stop, on_prompt=on_prompt, on_logits=on_logits)
        request = make_request(
            self._require_open(),
            self.info,
            prompt,
            options,
            policy=self._policy_for(options),
            n_ctx=self.n_ctx,
            seed=self.options.seed,
            should_stop=should_stop,
            on_prompt=on_prompt,
            on_logits=on_logits,
            prediction=self._predicted(prediction),
            turns_left_out=prompt.turns_left_out,
            form=prompt.form,
        )
        return Answer(self._require_open(), request, self.info.n_expert_used)

    def _policy_for(self, options: GenerateOptions) -> Policy:
        given = {name: getattr(options, name) for name in POLICY_OPTIONS}
        changes = {name: value for name, value in given.items() if value is not None}
        if not changes:
            return self._policy
        return self._make_policy(dataclasses.replace(self.options, **changes))

    def _join(self, answer: Answer, on_chunk: OnChunk) -> Reply:
        check_callables(on_chunk=on_chunk)
        running = self._hold.stream(answer)
        try:
            for chunk in running:
                if on_chunk is not None:
                    on_chunk(chunk)
        except KeyboardInterrupt:
            running.close()
        except MobileError as error:
            error.reply = answer.reply()
            raise
        return answer.reply()

    @speaks_python
    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids that ``generate`` makes of ``prompt``: text with what the model adds to it.

        Control tokens that the text names are read as such. Raises UsageError for what is neither text nor
        token ids, PromptTooLongError for a text that cannot fit into the context.
        """
        return prompt_tokens(self._require_open(), prompt, self.n_ctx)

    def chat_tokens(self, messages: Messages, *, special: bool = False, **values: Any) -> list[int]:
        """The prompt that ``messages`` make by the chat template, as token ids for ``stream``.

        ``values``, such as ``tools`` in OpenAI's form, are what the template may use besides the messages.
        What is written in them is text: ``<|im_end|>`` ends no turn, unless ``special`` is true.
        Raises UsageError if the template refuses them, PromptTooLongError if they cannot fit.
        """
        return self.chat_prompt(messages, special=special, **values)

    @speaks_python
    def chat_prompt(
        self,
        messages: Messages,
        *,
        special: bool = False,
        trim: bool = False,
        max_tokens: int | None = None,
        **values: Any,
    ) -> ChatPrompt:
        """``chat_tokens``, with ``trim`` without the oldest turns that leave the answer no room.

        That room is ``max_tokens``, at most an eighth of the context. What is returned knows how many turns
        it lacks, and so does the receipt of the answer that ``stream`` makes of it. It knows the form of its
        answer as well, where the engine knows the template's: with ``calls`` tools may be called.
        """
        backend = self._require_open()
        if self.info.chat_template is None:
            self._notify(f"{self.path.name} has no chat template: ChatML is used")
        return chat_prompt(
            backend, messages, self.n_ctx, special=special, trim=trim, max_tokens=max_tokens, values=values
        )

    @property
    def has_form(self) -> bool:
        """Whether prompts of chats know the form of their answers: thoughts apart, calls as the model's."""
        return self._require_open().has_form

    def prepare_constraints(self) -> None:
        """Make now what the first answer under a grammar or a schema needs of the vocabulary, once.

        Seconds for a large one, in which no thread of Python runs: better while nobody waits.
        """
        with self._hold.taken() as backend:
            backend.prepare_constraints()

    @property
    def crew(self) -> Crew:
        """Who makes answers: as many at once as ``parallel`` says, by the thread that asks for them."""
        return self._require_open().scheduler

    @property
    def can_generate(self) -> bool:
        """Whether the model continues texts; one that only makes embeddings does not."""
        return self._require_open().can_generate

    @property
    def pooling(self) -> str | None:
        """How the file wants embeddings pooled: ``mean``, ``last``, ``cls``; None if it does not say."""
        return self._require_open().pooling

    @speaks_python
    def embed(
        self, text: str | Sequence[int], *, pooling: str | None = None, should_stop: ShouldStop = None
    ) -> Embedding:
        """The vector of ``text``, or of token ids as they are, with all experts of every token.

        ``pooling`` is needed where the file does not say it. Raises UsageError, ModelBusyError,
        ExpertReadError, EngineError, AnswerStopped.
        """
        check_callables(should_stop=should_stop)
        with self._hold.taken() as backend:
            return embed(backend, self.info, text, pooling, should_stop)

    @speaks_python
    def rank(self, query: str, document: str, *, should_stop: ShouldStop = None) -> Score:
        """How well ``document`` answers ``query``, by a reranker. Raises as ``embed`` does."""
        check_callables(should_stop=should_stop)
        with self._hold.taken() as backend:
            return rank(backend, self.info, query, document, should_stop)

    def gap_tokens(self, before: str, after: str, begun: str = "") -> list[int]:
        """The prompt by which the model fills what is missing between two texts, as token ids for ``stream``.

        ``begun`` is what is known of it. Raises UsageError for a model that was not made for it.
        """
        return gap_prompt(self._require_open(), self.path.name, self.n_ctx, before, after, begun)

    @property
    def fills_gaps(self) -> bool:
        """Whether ``gap_tokens`` has a prompt for the model."""
        return self._require_open().fill_tokens is not None

    @property
    def slots(self) -> Slots | None:
        """The sequences of the context, by their numbers; None where there are none to be told of."""
        sequences = getattr(self.crew, "sequences", None)
        return Slots(sequences, self.sessions) if sequences else None

    # tokens, facts, end

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` reads control tokens, ``add_bos`` adds what the model adds.

        Raises UsageError for what is no text.
        """
        return tokenized(self._require_open(), text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Text of token ids; control tokens only if ``special``. Raises UsageError."""
        return b"".join(self.piece(token, special=special) for token in token_ids(tokens)).decode(
            errors="replace"
        )

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """A token's bytes, which need not be whole characters; none of a control token unless ``special``.

        Raises UsageError for a token that is not in the vocabulary.
        """
        return self._require_open().piece(self._own_token(token), special)

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends an answer."""
        return self._require_open().is_end(self._own_token(token))

    def _own_token(self, token: int) -> int:
        tokens = token_ids([token])
        check_tokens(tokens, self.info.n_vocab)
        return tokens[0]

    def last_logits(self) -> Any:
        """The logits [n_vocab] that the last token was sampled from, until the next one is asked for."""
        return self._require_open().last_logits()

    def stats(self) -> dict[str, Any]:
        """The model's settings, its expert store and devices, all counters since it was loaded; bytes and us.

        ``device`` is None on the host alone; ``placement`` in it has the figures of the comparison.
        ``prefetch`` counts the answer that runs or ran last.
        """
        return model_stats(
            self._require_open(),
            self.path,
            self._policy,
            n_expert_used=self.info.n_expert_used,
            n_ctx=self.n_ctx,
            totals=self._hold.totals,
            device_totals=self._hold.device_totals,
        )

    def devices(self) -> tuple[Device, ...]:
        """The devices that the model was loaded on, with their memory at that time; none: the host alone."""
        return self._require_open().devices

    def experts(self) -> Experts:
        """The live view of the experts: where each is, and what was just asked for. For any thread."""
        return self._hold.experts

    @property
    def fit(self) -> Fit | None:
        """Where the memory of this process goes; None where nothing was planned, on a stock library."""
        return getattr(self._require_open(), "fit", None)

    @property
    def sessions(self) -> Sessions | None:
        """The conversations on disk that prompts continue; None if there are none (``session_cache``)."""
        return getattr(self._require_open(), "sessions", None)

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that experts may take in host memory; None where they have no store."""
        store = self._require_open().store
        return store.budget_bytes if store is not None else None

    def close(self) -> None:
        """Free the model; a stream that was left unfinished ends. Raises ModelBusyError while generating."""
        self._hold.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError("a Model holds a loaded file and cannot be copied or pickled: load it again instead")

    def __repr__(self) -> str:
        state = "closed" if self._hold.is_closed else self._policy.mode
        return f"<Model {self.path.name} {state}>"

    def _require_open(self) -> Backend:
        return self._hold.backend()


def backend_of(model: Model) -> Any:
    """The decoder under a Model, a MobileLlama: for what converts, measures or tests.

    No part of the public API: it may be used only while the Model is open and makes no answer.
    """
    return model._require_open()
