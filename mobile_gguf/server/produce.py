"""Answering a request in the worker's thread: prompts, answers, tool calls, as a stream of events."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from mobile_gguf.api.aio import Job
from mobile_gguf.api.context import ChatPrompt, of_a_chat
from mobile_gguf.api.model import Model
from mobile_gguf.errors import AnswerStopped, PromptTooLongError, UsageError
from mobile_gguf.generate.answer.answer import INTERRUPTED, LENGTH, STOP, Chunk
from mobile_gguf.generate.answer.logprobs import PromptLogprobs, TokenLogprob, token_logprob
from mobile_gguf.generate.form.reading import CallDelta
from mobile_gguf.generate.prompts.chat_prompt import OWN_NAMES
from mobile_gguf.generate.text.text import TextStream
from mobile_gguf.options.words import TRIM

from .custom import CustomCalls
from .experts import ExpertMap
from .failures import TOO_LONG, ApiError, too_long
from .metrics import Metrics
from .requests import NOT_SAMPLING, ChatRequest, CompletionRequest, Generation
from .schemas import check_schema
from .tools import (
    END_MARK,
    MARK,
    MAX_CALLS,
    CallParser,
    ToolPlan,
    plan_tools,
    speaks_tools,
    template_messages,
)
from .usage import Spent

TOOL_CALLS = "tool_calls"
IN_WORDS = "the tools are told in words: no form of this model's own calls is known"
# what a template, or chat_prompt, is given besides
_TEMPLATE_NAMES = OWN_NAMES | {"trim", "max_tokens", "self", "calls"}


@dataclass(frozen=True)
class Event:
    """Something new in choice ``choice``; the very first event of a request only says that it is begun."""

    choice: int = 0
    text: str = ""
    reasoning: str = ""
    call: CallDelta | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


BEGUN = Event(choice=-1)


class Producer:
    """Makes the events of one request; ``spent`` is what they cost when they have ended."""

    def __init__(self, model: Model, experts: ExpertMap, metrics: Metrics, defaults: dict[str, Any]) -> None:
        self._model = model
        self._experts = experts
        self._metrics = metrics
        self._defaults = defaults
        self.spent = Spent()

    def events(
        self, job: Job[Event], request: ChatRequest | CompletionRequest
    ) -> Generator[Event, None, None]:
        """The events of a request. Raises ApiError and what the Model raises."""
        if isinstance(request, ChatRequest):
            return self.chat(job, request)
        return self.completion(job, request)

    def chat(self, job: Job[Event], request: ChatRequest) -> Generator[Event, None, None]:
        """The events of a chat completion. Raises ApiError and what the Model raises."""
        plan = plan_tools(request)
        events = self._chat(job, request, plan)
        if plan is None or not plan.custom_names:
            yield from events
            return
        self.spent.notes += plan.notes
        calls: dict[int, CustomCalls] = {}
        with closing(events):
            for event in events:
                of_choice = calls.setdefault(event.choice, CustomCalls(plan.custom_names))
                if event.finish_reason is not None:
                    for call in of_choice.rest():
                        yield Event(event.choice, call=call)
                told = of_choice.told(event.call) if event.call is not None else None
                if event.call is None or told is not None:
                    yield replace(event, call=told)

    def _chat(
        self, job: Job[Event], request: ChatRequest, plan: ToolPlan | None
    ) -> Generator[Event, None, None]:
        options = self._options(request)
        limit = request.max_completion_tokens
        if limit is not None:
            options["max_tokens"] = limit
        schema = _response_schema(request)
        if schema is not None:
            if "grammar" in options or "json_schema" in options:
                raise ApiError(400, "give response_format, grammar or json_schema, not several of them")
            options["json_schema"] = schema
        trim = of_a_chat(options)["context_full"] == TRIM
        prompt = self.chat_prompt(request, trim=trim, max_tokens=options.get("max_tokens"))
        if request.prediction is not None:
            options["prediction"] = request.prediction.text
        n_top = (request.top_logprobs or 0) if request.logprobs else None
        if plan is None:
            yield from self._plain(job, [prompt], request, options, n_top)
            return
        if prompt.form is not None and prompt.form.has_calls:
            self.spent.notes += prompt.form.notes
            yield from self._plain(job, [prompt], request, options, n_top)
            return
        if "grammar" in options or "json_schema" in options:
            raise ApiError(
                400,
                "how this model calls tools is not known, so that a schema or a grammar cannot go with them: "
                "set tool_choice to none",
                param="tools",
            )
        if not speaks_tools(self._model.info.chat_template):
            self.spent.notes.append(IN_WORDS)
        schema, notes = plan.schema()
        self.spent.notes += notes
        self._admit(prompt, "messages")
        yield BEGUN
        for choice in range(request.n or 1):
            yield from self._with_tools(job, prompt, _seeded(options, choice), plan, schema, choice, n_top)

    def chat_prompt(
        self, request: ChatRequest, *, trim: bool = False, max_tokens: int | None = None
    ) -> ChatPrompt:
        """The prompt of a chat. Raises ApiError and what the Model raises."""
        plan = plan_tools(request)
        values = request.template_values()
        if reserved := sorted(_TEMPLATE_NAMES & values.keys()):
            raise ApiError(
                400, f"chat_template_kwargs may not set {reserved[0]}", param="chat_template_kwargs"
            )
        if self._options(request).get("reasoning_budget") == 0:
            values.setdefault("enable_thinking", False)

        def make(native: bool, **more: Any) -> ChatPrompt:
            return self._model.chat_prompt(
                template_messages(request.messages, plan, native),
                trim=trim,
                max_tokens=max_tokens,
                special=bool(request.special),
                **values | more,
            )

        tools = [tool.as_function() for tool in plan.tools] if plan is not None else None
        native = speaks_tools(self._model.info.chat_template)
        try:
            if plan is not None and self._model.has_form:
                with contextlib.suppress(UsageError):  # of a template that wants no tools
                    prompt = make(True, tools=tools, calls=plan.of_form())
                    if prompt.form is not None and prompt.form.has_calls:
                        return prompt
            if plan is not None and plan.forced:
                values.setdefault("enable_thinking", False)
            if plan is None and self._model.has_form and _has_calls(request):
                with contextlib.suppress(UsageError):
                    return make(True)
            return make(native, tools=tools) if plan is not None and native else make(native)
        except PromptTooLongError as error:
            raise too_long(error, "messages") from None

    def completion(self, job: Job[Event], request: CompletionRequest) -> Generator[Event, None, None]:
        """The events of a text completion. Raises ApiError and what the Model raises."""
        given: Any = request.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if request.suffix:
            prompts = [self._gap(prompt, request.suffix) for prompt in given]
        else:
            prompts = [self._tokens(prompt) for prompt in given]
        options = self._options(request)
        yield from self._plain(job, prompts, request, options, request.logprobs, bool(request.echo))

    def filling(
        self, job: Job[Event], request: Generation, before: str, after: str, begun: str = ""
    ) -> Generator[Event, None, None]:
        """The events of what stands between two texts. Raises ApiError and what the Model raises."""
        prompt = self._gap(before, after, begun)
        yield from self._plain(job, [prompt], request, self._options(request), None)

    def _gap(self, before: str, after: str, begun: str = "") -> list[int]:
        try:
            return self._model.gap_tokens(before, after, begun)
        except PromptTooLongError as error:
            raise too_long(error, "prompt") from None

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            if max(prompt) >= self._model.info.n_vocab > 0:
                raise ApiError(400, f"token {max(prompt)} is not in the vocabulary", param="prompt")
            return prompt
        try:
            return self._model.prompt_tokens(prompt)
        except PromptTooLongError as error:
            raise too_long(error, "prompt") from None

    def _options(self, request: Generation) -> dict[str, Any]:
        given = request.options()
        options = {**self._defaults, **{name: given[name] for name in given.keys() - NOT_SAMPLING}}
        if not options.get("grammar"):  # llama.cpp's clients send an empty one for none
            options.pop("grammar", None)
        if request.stop is not None:
            options["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
        if request.json_schema is not None:
            check_schema(request.json_schema, "json_schema")
            options["json_schema"] = request.json_schema
        return options

    def _admit(self, prompt: list[int], param: str) -> None:
        if len(prompt) >= self._model.n_ctx:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and the context only {self._model.n_ctx}: "
                "shorten it, or start the server with a larger --ctx-size",
                param=param,
                code=TOO_LONG,
            )
        self.spent.add_prompt(len(prompt), prompt.turns_left_out if isinstance(prompt, ChatPrompt) else 0)

    def _plain(
        self,
        job: Job[Event],
        prompts: list[list[int]],
        request: Generation,
        options: dict[str, Any],
        n_top: int | None,
        echo: bool = False,
    ) -> Iterator[Event]:
        """The answers to each prompt in turn; ``echo``: after it, with its log probabilities if asked for."""
        for prompt in prompts:
            self._admit(prompt, "messages" if isinstance(request, ChatRequest) else "prompt")
        n = request.n or 1
        scored: PromptLogprobs | None = None

        def ask(choice: int) -> Generator[Chunk, None, None]:
            nonlocal scored
            prompt, i = prompts[choice // n], choice % n
            more: dict[str, Any] = {}
            if i == 0 and echo and n_top is not None:
                scored = more["on_logits"] = PromptLogprobs(self._model, prompt, n_top)
            return self._chunks(job, prompt, _seeded(options, i) | more, is_first=i == 0)

        # Made before anything is said, so that a bad option is an error with its status.
        first = ask(0)
        yield BEGUN
        for choice in range(len(prompts) * n):
            is_told = not echo
            with closing(first if choice == 0 else ask(choice)) as chunks:
                n_calls = 0
                for chunk in chunks:
                    if not is_told:
                        is_told = True
                        text = self._model.detokenize(prompts[choice // n])
                        yield Event(choice, text, logprobs=tuple(scored.tokens) if scored else ())
                    n_calls += len(chunk.calls)
                    yield from self._events(choice, chunk, n_top, n_calls > 0)

    def _events(self, choice: int, chunk: Chunk, n_top: int | None, has_calls: bool) -> Iterator[Event]:
        reason = TOOL_CALLS if has_calls and chunk.finish_reason == STOP else chunk.finish_reason
        first = Event(choice, chunk.text, chunk.reasoning, logprobs=self._logprobs(chunk, n_top))
        if not chunk.calls:
            yield replace(first, finish_reason=reason)
            return
        if chunk.text or chunk.reasoning or first.logprobs:
            yield first
        for call in chunk.calls:
            yield Event(choice, call=call)
        if reason is not None:
            yield Event(choice, finish_reason=reason)

    def _logprobs(self, chunk: Chunk, n_top: int | None) -> tuple[TokenLogprob, ...]:
        if n_top is None or chunk.token is None or self._model.is_end(chunk.token):
            return ()
        return (token_logprob(self._model, chunk.token, self._model.last_logits(), n_top),)

    def _chunks(
        self, job: Job[Event], prompt: list[int], options: dict[str, Any], *, is_first: bool
    ) -> Generator[Chunk, None, None]:
        """One answer, counted however it ends; raises ApiError when it was stopped from outside.

        ``is_first`` of those to its prompt: only of that one what was in the context already is of interest.
        """
        try:
            chunks = self._model.stream(prompt, should_stop=job.is_cancelled, **options)
        except AnswerStopped:
            raise _cut() from None
        return self._counted(chunks, is_first)

    def _counted(self, chunks: Any, is_first: bool) -> Generator[Chunk, None, None]:
        last: Chunk | None = None
        with closing(chunks), self._experts.answering():
            try:
                for chunk in chunks:
                    last = chunk
                    self.spent.note(chunk, is_first)
                    self._experts.add_token()
                    if chunk.finish_reason == INTERRUPTED:
                        raise _cut()
                    yield chunk
            finally:
                if last is not None:
                    self.spent.add(last, is_first)
                    self._metrics.add_answer(last, is_first)

    def _with_tools(
        self,
        job: Job[Event],
        prompt: list[int],
        options: dict[str, Any],
        plan: ToolPlan,
        schema: dict[str, Any],
        choice: int,
        n_top: int | None,
    ) -> Iterator[Event]:
        """One answer that may hold calls: words until a marker, then a call under the grammar, and again."""
        turn = _Turn(self, job, prompt, options, choice, n_top)
        if plan.forced:
            turn.tokens += self._model.tokenize(MARK + "\n")
        else:
            yield from turn.words(keep=True)
        n_calls = 0
        while turn.reason is None and n_calls < MAX_CALLS:
            yield from turn.call(n_calls, schema)
            n_calls += 1
            if turn.reason is None:
                if not plan.parallel:
                    break
                turn.tokens += self._model.tokenize(f"\n{END_MARK}")
                yield from turn.words(keep=False)
        cut = turn.reason == LENGTH
        yield Event(choice, finish_reason=LENGTH if cut else TOOL_CALLS if n_calls else STOP)


class _Turn:
    """The state of an answer with tools: ``tokens`` so far, and why it ended, once it has."""

    def __init__(
        self,
        producer: Producer,
        job: Job[Event],
        prompt: list[int],
        options: dict[str, Any],
        choice: int,
        n_top: int | None,
    ) -> None:
        self.tokens = list(prompt)
        self.reason: str | None = None
        self._begun = False
        self._producer = producer
        self._job = job
        self._options = options
        self._choice = choice
        self._n_top = n_top
        asked = options.get("max_tokens")
        self._room = asked if asked is not None and asked >= 0 else None

    def words(self, keep: bool) -> Iterator[Event]:
        """Generate until a call's marker or the end; words after a call are not kept, they end the answer."""
        start, text = list(self.tokens), ""
        scanner = TextStream((MARK,))
        for chunk in self._chunks({}):
            text += chunk.text
            words = scanner.push(chunk.text.encode()) if chunk.text else ""
            logprobs = self._producer._logprobs(chunk, self._n_top)
            if scanner.stopped:
                if keep and words:
                    yield Event(self._choice, words)
                self._after_marker(start, text)
                return
            if not keep and words.strip():
                self.reason = STOP
                return
            if chunk.finish_reason is not None:
                self.reason = chunk.finish_reason
                words += scanner.finish()
            if keep and (words or logprobs):
                yield Event(self._choice, words, logprobs=logprobs)

    def _after_marker(self, start: list[int], text: str) -> None:
        before, _, after = text.partition(MARK)
        if after.strip():
            # the token that ended the marker began the call: both are written anew
            model = self._producer._model
            self.tokens = start + model.tokenize(before, special=False) + model.tokenize(MARK + "\n")

    def call(self, index: int, schema: dict[str, Any]) -> Iterator[Event]:
        """Generate one call under the grammar."""
        parser = CallParser(index)
        for chunk in self._chunks({"json_schema": schema, "stop": None}):
            for delta in parser.push(chunk.text):
                yield Event(self._choice, call=delta)
            if chunk.finish_reason == LENGTH:
                self.reason = LENGTH

    def _chunks(self, changes: dict[str, Any]) -> Iterator[Chunk]:
        options = self._options | changes | ({} if self._room is None else {"max_tokens": self._room})
        model = self._producer._model
        if len(self.tokens) >= model.n_ctx or self._room == 0:
            self.reason = LENGTH
            return
        is_first = self._choice == 0 and not self._begun
        self._begun = True
        with closing(self._producer._chunks(self._job, self.tokens, options, is_first=is_first)) as chunks:
            self.tokens = list(self.tokens)
            for chunk in chunks:
                if chunk.token is not None:
                    if self._room is not None:
                        self._room -= 1
                    if not model.is_end(chunk.token):
                        self.tokens.append(chunk.token)
                yield chunk


def _has_calls(request: ChatRequest) -> bool:
    """Whether tools were called earlier."""
    return any(message.tool_calls or message.role in ("tool", "function") for message in request.messages)


def _cut() -> ApiError:
    return ApiError(503, "the answer was cut: the server is shutting down", code="cut")


def _seeded(options: dict[str, Any], i: int) -> dict[str, Any]:
    seed = options.get("seed")
    return options if not i or seed is None or seed < 0 else options | {"seed": seed + i}


def _response_schema(request: ChatRequest) -> dict[str, Any] | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise ApiError(
                400, "response_format json_schema needs a schema", param="response_format.json_schema"
            )
        schema = wanted.json_schema.schema_
    else:
        schema = wanted.schema_ or {"type": "object"}
    check_schema(schema, "response_format")
    return schema
