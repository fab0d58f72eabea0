"""One answer in three layers: steps that yield tokens, chunks of text, a joined reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mobile_gguf.engine.structs import (
    Counters,
    DeviceCounters,
    LossCounters,
    ModelInfo,
    PrefetchCounters,
    WarmCounters,
)
from mobile_gguf.errors import AnswerStopped

from .decode import Pass, Policy
from .notebook import reply_html
from .receipt import Receipt, Timings, loss_of
from .text import TextStream

if TYPE_CHECKING:
    from mobile_gguf.device.tier import DeviceTier
    from mobile_gguf.engine.devices import Device
    from mobile_gguf.engine.experts import Experts
    from mobile_gguf.engine.loss import Buddies
    from mobile_gguf.gguf.info import GgufInfo

    from .auto import Auto
    from .head import Head
    from .threads import FollowingThreads

STOP, LENGTH, INTERRUPTED = "stop", "length", "interrupted"


@dataclass(frozen=True)
class Chunk:
    """What one token added. ``text`` may be empty while a character or a stop string is incomplete.

    ``token`` is None where no token came, as when an answer is interrupted. ``finish_reason`` is set on
    the last chunk: ``stop`` (the model ended it, or a stop string), ``length`` or ``interrupted``.
    ``prompt_evaluated`` are the prompt's tokens that had to be computed; the others were in the context.
    """

    text: str
    token: int | None
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float
    finish_reason: str | None
    receipt: Receipt
    prompt_evaluated: int = 0


@dataclass(frozen=True)
class Reply:
    """A whole answer; ``timings`` has llama-server's names, ``usage`` OpenAI's."""

    text: str
    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float]
    receipt: Receipt
    tokens: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The object that ``run --json`` prints."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "timings": self.timings,
            "receipt": self.receipt.to_dict(),
        }

    def _repr_html_(self) -> str:
        return reply_html(self.to_dict())


class Text(Protocol):
    """What an answer needs of the text that it continues; TokenSequence is the real one."""

    policy: Policy
    last_pass: Pass
    prompt_evaluated: int
    prompt_done: float
    should_stop: Callable[[], bool] | None  # asked while a prompt is computed
    on_prompt: Callable[[int, int], object] | None  # told how many of its tokens are done, of how many
    on_logits: Callable[[int, Any], object] | None  # given a prompt token's place, and the logits after it


class Backend(Protocol):
    """What an answer needs of a decoder; MobileLlama is the real one, tests script another."""

    store: ModelInfo | None  # None without an expert store
    has_engine: bool
    device: DeviceTier | None  # None without slots on a device
    threads: FollowingThreads | None  # None where their number is fixed
    devices: tuple[Device, ...]  # that the model is on; none: the host alone
    auto: Auto | None  # what mode auto knows of the model; None before it was asked for

    @property
    def sequence(self) -> Text: ...
    @property
    def n_ubatch(self) -> int: ...
    @property
    def can_step_back(self) -> bool: ...
    @property
    def head(self) -> Head | None: ...  # None for a model that was not calibrated
    @property
    def buddies(self) -> Buddies | None: ...  # likewise
    @property
    def can_generate(self) -> bool: ...
    @property
    def pooling(self) -> str | None: ...  # what the file asks for
    @property
    def embedding_limit(self) -> int: ...

    def experts(self, info: GgufInfo) -> Experts: ...
    def embed_tokens(self, tokens: list[int], pooling: str) -> Any: ...
    def generate(self, tokens: list[int], **sampling: Any) -> Generator[int, Any, None]: ...
    def tokenize(self, text: bytes, add_bos: bool = ..., special: bool = ...) -> list[int]: ...
    def piece(self, token: int, special: bool = ...) -> bytes: ...
    def is_end(self, token: int) -> bool: ...
    def last_logits(self) -> Any: ...
    def check_fits(self, text: bytes, n_tokens: int) -> None: ...
    def render_chat(
        self, messages: list[dict[str, Any]], *, special: bool = ..., **values: Any
    ) -> list[int]: ...
    def make_grammar(
        self, grammar: str | None, json_schema: Any, should_stop: Callable[[], bool] | None = ...
    ) -> Any: ...
    def prepare_constraints(self) -> None: ...
    def set_seed(self, seed: int) -> None: ...
    def counters(self) -> Counters: ...
    def device_counters(self) -> DeviceCounters: ...
    def prefetch_counters(self) -> PrefetchCounters: ...
    def loss_counters(self) -> LossCounters: ...
    def warm_counters(self) -> WarmCounters: ...
    def reset_counters(self) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...


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
    fills_context: bool = False  # max_tokens is what the context has room for, and not what was asked for


def generate_steps(backend: Backend, request: Request) -> Generator[tuple[int, Pass], None, None]:
    """The bottom layer: sampled tokens, each with the pass its logits came from, without an end."""
    text = backend.sequence
    text.policy = request.policy
    text.should_stop = request.should_stop
    text.on_prompt = request.on_prompt
    text.on_logits = request.on_logits
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
        self._passes = dict.fromkeys(Pass, 0)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._thread_changes = backend.threads.n_changes if backend.threads is not None else 0
        self._busy_seconds = 0.0
        self._prompt_seconds = 0.0
        self._counters = Counters()
        self._device_counters = DeviceCounters()
        self._ahead = PrefetchCounters()
        self._loss = LossCounters()
        store = backend.store
        self._budget_bytes = store.budget_bytes if store is not None else 0
        self.finish_reason: str | None = None

    def stream(self) -> Generator[Chunk, None, None]:
        """Yield a chunk per token until the end; Ctrl-C or ``should_stop`` make it ``interrupted``."""
        self._backend.reset_counters()
        self._backend.sequence.prompt_evaluated = 0
        should_stop = self._request.should_stop or _never
        with closing(generate_steps(self._backend, self._request)) as steps:
            while self.finish_reason is None:
                try:
                    chunk = self._end(INTERRUPTED) if should_stop() else self._advance(steps)
                except (KeyboardInterrupt, AnswerStopped):
                    chunk = self._end(INTERRUPTED)
                yield chunk

    def _advance(self, steps: Iterator[tuple[int, Pass]]) -> Chunk:
        if self._request.max_tokens <= 0:
            if self._request.on_logits is not None:
                self._step(steps)  # for its prompt: the token is not wanted
            return self._end(LENGTH)
        token, kind = self._step(steps)
        self._tokens.append(token)
        self._passes[kind] += 1
        if self._backend.is_end(token):
            return self._end(STOP, token)
        text = self._text.push(self._backend.piece(token))
        if self._text.stopped:
            self.finish_reason = STOP
        elif len(self._tokens) >= self._request.max_tokens:
            return self._end(LENGTH, token, text)
        return self._chunk(text, token)

    def _step(self, steps: Iterator[tuple[int, Pass]]) -> tuple[int, Pass]:
        """The next token; what it took is counted."""
        started = time.perf_counter()
        try:
            made = next(steps)
        finally:
            ended = time.perf_counter()
            self._busy_seconds += ended - started
            self._counters = self._backend.counters()
            self._device_counters = self._backend.device_counters()
            self._ahead = self._backend.prefetch_counters()
            self._loss = self._backend.loss_counters()
        if not self._tokens:
            # Sampling the first token belongs to the generation, as in llama-server.
            self._prompt_seconds = max(0.0, min(self._backend.sequence.prompt_done, ended) - started)
        return made

    def _end(self, reason: str, token: int | None = None, text: str = "") -> Chunk:
        self.finish_reason = reason
        return self._chunk(text + self._text.finish(), token)

    def _chunk(self, text: str, token: int | None) -> Chunk:
        self._pieces.append(text)
        return Chunk(
            text=text,
            token=token,
            prompt_tokens=len(self._request.prompt),
            completion_tokens=len(self._tokens),
            tokens_per_second=self.timings().predicted_per_second,
            finish_reason=self.finish_reason,
            receipt=self.receipt(),
            prompt_evaluated=self._backend.sequence.prompt_evaluated,
        )

    def timings(self) -> Timings:
        """Times so far, without what the consumer of the stream took."""
        prompt_seconds = self._prompt_seconds if self._tokens else self._busy_seconds
        return Timings(
            prompt_n=self._backend.sequence.prompt_evaluated,
            prompt_ms=prompt_seconds * 1e3,
            predicted_n=len(self._tokens),
            predicted_ms=(self._busy_seconds - prompt_seconds) * 1e3,
        )

    def receipt(self) -> Receipt:
        """The receipt so far."""
        policy, threads = self._request.policy, self._backend.threads
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
            context_full=self.finish_reason == LENGTH and self._request.fills_context,
            loss=loss_of(self._loss, policy.spending) if policy.may_lose else None,
            **read_traffic(self._backend, self._counters, self._device_counters, self._ahead),
        )

    @property
    def counters(self) -> Counters:
        """The store's counters for this answer so far."""
        return self._counters

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
        )
