"""One answer in three layers: steps that yield tokens, chunks of text, a joined reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from mobile_gguf.engine.structs import Counters, DeviceCounters, PrefetchCounters
from mobile_gguf.errors import AnswerStopped

from ..backend import Backend, Text
from ..form.form import Form
from ..form.reading import AnswerReader, Call, CallDelta, Delta
from ..passes.costs import Traffic
from ..passes.decode import Pass, Policy
from ..speculation.drafting import Record
from ..text.text import TextStream
from .notebook import reply_html
from .receipt import Receipt, Timings, loss_of, speculation_of

STOP, LENGTH, INTERRUPTED = "stop", "length", "interrupted"


@dataclass(frozen=True)
class Chunk:
    """What one token added. ``text`` may be empty while a character or a stop string is incomplete.

    ``token`` is None where no token came, as when an answer is interrupted. ``finish_reason`` is set on
    the last chunk: ``stop`` (the model ended it, or a stop string), ``length`` or ``interrupted``.
    ``prompt_evaluated`` are the prompt's tokens that had to be computed; the others were in the context.
    ``reasoning`` is what was thought, and ``calls`` pieces of tool calls, which ``text`` has none of.
    """

    text: str
    token: int | None
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float
    finish_reason: str | None
    receipt: Receipt
    prompt_evaluated: int = 0
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A whole answer; ``timings`` has llama-server's names, ``usage`` OpenAI's.

    ``reasoning`` is what the model thought, ``calls`` the tools it calls, in a chat whose form is known.
    """

    text: str
    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float]
    receipt: Receipt
    tokens: tuple[int, ...] = ()
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The object that ``run --json`` prints."""
        made = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "timings": self.timings,
            "receipt": self.receipt.to_dict(),
        }
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        if self.calls:
            made["tool_calls"] = [asdict(call) for call in self.calls]
        return made

    def _repr_html_(self) -> str:
        return reply_html(self.to_dict())


@dataclass(frozen=True)
class Request:
    """Everything that decides an answer, resolved: nothing is None that has a default."""

    prompt: list[int]
    policy: Policy
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    sampling: dict[str, Any]
    cache_prompt: bool = True
    should_stop: Callable[[], bool] | None = None
    on_prompt: Callable[[int, int], object] | None = None
    on_logits: Callable[[int, Any], object] | None = None
    turns_left_out: int = 0
    prediction: tuple[int, ...] = ()  # tokens that much of the answer may be
    form: Form | None = None  # how the answer is written, where it is known
    fills_context: bool = False  # max_tokens is what the context has room for, and not what was asked for


def generate_steps(backend: Backend, text: Text, request: Request) -> Generator[tuple[int, Pass], None, None]:
    """The bottom layer: sampled tokens, each with the pass its logits came from, without an end."""
    text.policy = request.policy
    text.should_stop = request.should_stop
    text.on_prompt = request.on_prompt
    text.on_logits = request.on_logits
    text.n_wanted = request.max_tokens
    text.prediction = request.prediction
    backend.set_seed(request.seed)
    if not request.cache_prompt:
        backend.forget()
    with closing(backend.generate(list(request.prompt), **request.sampling)) as tokens:
        for token in tokens:
            yield token, text.last_pass


def read_traffic(
    backend: Backend, host: Counters, on_device: DeviceCounters, ahead: PrefetchCounters
) -> dict[str, Any]:
    """The fields of a receipt that say which experts were needed and what moved."""
    return {
        "expert_hits": host.n_hits,
        "expert_misses": host.n_misses,
        "bytes_read": host.bytes_read,
        "stall_ms": host.stall_us / 1e3,
        "resident_bytes_peak": host.resident_bytes_peak,
        "device_hits": on_device.n_hits,
        "device_misses": on_device.n_misses,
        "bytes_uploaded": on_device.bytes_uploaded,
        "upload_stall_ms": on_device.upload_us / 1e3,
        "vram_budget_bytes": backend.device.budget_bytes if backend.device is not None else 0,
        "prefetch_hits": ahead.n_used + on_device.n_ahead_used,
        "prefetch_wasted_bytes": ahead.bytes_wasted + on_device.bytes_ahead_wasted,
        "prefetch_saved_ms": (ahead.saved_us + on_device.ahead_saved_us) / 1e3,
    }


def _never() -> bool:
    return False


class Answer:
    """An answer in the making; ``stream`` drives it, ``reply`` joins what there is so far."""

    def __init__(self, backend: Backend, request: Request, n_expert_used: int) -> None:
        self._backend = backend
        self._request = request
        self._n_expert_used = n_expert_used
        self._text = TextStream(request.stop)
        form = request.form
        self._reader: AnswerReader | None = backend.reader(form) if form is not None else None
        self._shown = backend.shown(form) if form is not None else frozenset()
        self._reasoning: list[str] = []
        self._passes = dict.fromkeys(Pass, 0)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._thread_changes = backend.threads.n_changes if backend.threads is not None else 0
        self._busy_seconds = 0.0
        self._prompt_seconds = 0.0
        self._traffic = Traffic()
        self._prompt_evaluated = 0
        self._record: Record | None = None
        store = backend.store
        self._budget_bytes = store.budget_bytes if store is not None else 0
        self.finish_reason: str | None = None

    def stream(self) -> Generator[Chunk, None, None]:
        """Yield a chunk per token until the end; Ctrl-C or ``should_stop`` make it ``interrupted``."""
        should_stop, backend, request = self._request.should_stop or _never, self._backend, self._request
        with (
            backend.seated(request.prompt, request.policy.always_big) as text,
            closing(generate_steps(backend, text, request)) as steps,
        ):
            while self.finish_reason is None:
                try:
                    chunk = self._end(INTERRUPTED) if should_stop() else self._advance(text, steps)
                except (KeyboardInterrupt, AnswerStopped):
                    chunk = self._end(INTERRUPTED)
                yield chunk

    def _advance(self, text: Text, steps: Iterator[tuple[int, Pass]]) -> Chunk:
        if self._request.max_tokens <= 0:
            if self._request.on_logits is not None:
                self._step(text, steps)  # for its prompt: the token is not wanted
            return self._end(LENGTH)
        token, kind = self._step(text, steps)
        self._tokens.append(token)
        self._passes[kind] += 1
        if self._backend.is_end(token):
            return self._end(STOP, token)
        new = self._text.push(self._backend.piece(token, token in self._shown))
        if self._text.stopped:
            return self._end(STOP, token, new)
        if len(self._tokens) >= self._request.max_tokens:
            return self._end(LENGTH, token, new)
        return self._chunk(new, token)

    def _step(self, text: Text, steps: Iterator[tuple[int, Pass]]) -> tuple[int, Pass]:
        """The next token; what it took is counted."""
        started = time.perf_counter()
        try:
            made = next(steps)
        finally:
            ended = time.perf_counter()
            self._busy_seconds += ended - started
            self._traffic = text.traffic()
            self._prompt_evaluated = text.prompt_evaluated
            self._record = text.drafting.record if text.drafting is not None else None
        if not self._tokens:
            # Sampling the first token belongs to the generation, as in llama-server.
            self._prompt_seconds = max(0.0, min(text.prompt_done, ended) - started)
        return made

    def _end(self, reason: str, token: int | None = None, text: str = "") -> Chunk:
        self.finish_reason = reason
        return self._chunk(text + self._text.finish(), token)

    def _read(self, text: str) -> Delta:
        """What of new text is for the reader, and what was thought or is called."""
        if self._reader is None:
            return Delta(text)
        new = self._reader.push(text) if text else Delta()
        if self.finish_reason is None:
            return new
        rest = self._reader.finish(self.finish_reason == STOP)
        return Delta(new.text + rest.text, new.reasoning + rest.reasoning, new.calls + rest.calls)

    def _chunk(self, text: str, token: int | None) -> Chunk:
        new = self._read(text)
        self._pieces.append(new.text)
        self._reasoning.append(new.reasoning)
        return Chunk(
            text=new.text,
            token=token,
            prompt_tokens=len(self._request.prompt),
            completion_tokens=len(self._tokens),
            tokens_per_second=self.timings().predicted_per_second,
            finish_reason=self.finish_reason,
            receipt=self.receipt(),
            prompt_evaluated=self._prompt_evaluated,
            reasoning=new.reasoning,
            calls=new.calls,
        )

    def timings(self) -> Timings:
        """Times so far, without what the consumer of the stream took."""
        prompt_seconds = self._prompt_seconds if self._tokens else self._busy_seconds
        return Timings(
            prompt_n=self._prompt_evaluated,
            prompt_ms=prompt_seconds * 1e3,
            predicted_n=len(self._tokens),
            predicted_ms=(self._busy_seconds - prompt_seconds) * 1e3,
        )

    def receipt(self) -> Receipt:
        """The receipt so far."""
        policy, threads, traffic = self._request.policy, self._backend.threads, self._traffic
        return Receipt(
            mode=policy.mode,
            n_expert_used=self._n_expert_used,
            little_k=policy.little_k,
            tokens_big=self._passes[Pass.BIG],
            tokens_little=self._passes[Pass.LITTLE],
            tokens_fallback=self._passes[Pass.FALLBACK],
            budget_bytes=self._budget_bytes,
            turns_left_out=self._request.turns_left_out,
            threads=threads.threads if threads is not None else 0,
            thread_changes=threads.n_changes - self._thread_changes if threads is not None else 0,
            n_ubatch=self._backend.n_ubatch,
            little_corrected=policy.correction is not None,
            context_full=self.finish_reason == LENGTH and self._request.fills_context,
            loss=loss_of(traffic.loss, policy.spending) if policy.may_lose else None,
            speculation=speculation_of(self._record) if self._record is not None else None,
            **read_traffic(self._backend, traffic.host, traffic.device, traffic.ahead),
        )

    @property
    def counters(self) -> Counters:
        """The store's counters for this answer so far."""
        return self._traffic.host

    def reply(self) -> Reply:
        """The answer so far as a whole; one that was not streamed to its end counts as interrupted."""
        return Reply(
            text="".join(self._pieces),
            finish_reason=self.finish_reason or INTERRUPTED,
            usage={
                "prompt_tokens": len(self._request.prompt),
                "completion_tokens": len(self._tokens),
            },
            timings=self.timings().to_dict(),
            receipt=self.receipt(),
            tokens=tuple(self._tokens),
            reasoning="".join(self._reasoning),
            calls=self._reader.calls if self._reader is not None else (),
        )
