"""The thread that owns the model: it loads, generates and closes, and only posts messages.

A daemon thread of its own and not one of a pool, so that an engine that is stuck cannot keep the program from
ending. The library computes with the interpreter's lock released: the screen stays responsive.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from textual.message import Message

from mobile_gguf.api.context import of_a_chat, way_out
from mobile_gguf.api.model import Model, check_model, load
from mobile_gguf.api.session_cache import with_sessions
from mobile_gguf.api.stats import running_facts
from mobile_gguf.api.words import python_words, with_flags
from mobile_gguf.engine.experts import Asked, Experts, Places, Watch
from mobile_gguf.errors import EngineMemoryError, MobileError, PromptTooLongError, UsageError
from mobile_gguf.generate.answer.answer import INTERRUPTED, Chunk
from mobile_gguf.generate.answer.receipt import Receipt
from mobile_gguf.generate.passes.decode import Pass
from mobile_gguf.generate.request.recommended import recommended
from mobile_gguf.remote.experts import RemoteExperts, RemoteWatch
from mobile_gguf.remote.model import RemoteModel

from .messages import AnswerEnded, AnswerProgressed, LoadFailed, LoadProgressed, ModelLoaded, PromptProgressed
from .outbox import Outbox, Token

# Progress of a load is worth a message this often.
_PROGRESS_SECONDS = 0.1
# What conversations may take on their way to the disk, at the end.
_WRITING_SECONDS = 60.0


class Cancelled(Exception):
    """Raised inside a load that the user cancelled."""


Stop = threading.Event  # one for each command: ending one must not end, or let run, another


class EngineThread(threading.Thread):
    """Obeys commands one after the other; ``stop`` ends the last one given early, or before it begins."""

    def __init__(
        self,
        post: Callable[[Message], Any],
        *,
        loader: Callable[..., Model | RemoteModel] = load,
        finder: Callable[..., object] = check_model,
    ) -> None:
        super().__init__(name="mobile-gguf-engine", daemon=True)
        self._post_message = post
        self._loader, self._finder = loader, finder
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._last = Stop()
        self._closes = threading.Event()
        self._model: Model | RemoteModel | None = None
        self._reference = ""
        self._experts: Experts | RemoteExperts | None = None
        # Set by the screen: whether to record what each token is routed to.
        self.watching = False

    # what the screen calls

    def load(self, reference: str, options: dict[str, Any], number: int = 0) -> None:
        """End a running answer or load, close the model and load another.

        Ends in ModelLoaded or LoadFailed, which have the ``number``.
        """
        self.stop()
        self._last = stop = Stop()
        self._commands.put(lambda: self._load(reference, options, stop, number))

    def generate(self, answer_id: int, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Answer ``messages``; AnswerProgressed while tokens come, then one AnswerEnded."""
        self._last = stop = Stop()
        self._commands.put(lambda: self._generate(answer_id, messages, options, stop))

    def stop(self) -> None:
        """End the answer or load that was asked for last, as soon as the engine asks."""
        self._last.set()

    def places(self) -> Places | None:
        """Where the experts are now; None without a model, or while one is being opened or closed."""
        experts = self._experts
        return experts.places() if experts is not None else None

    def facts(self) -> dict[str, Any]:
        """What others may see of the model that is loaded, from any thread; none without one."""
        model = self._model
        if model is None:
            return {}
        if isinstance(model, RemoteModel):
            return {"model": model.name, "address": model.server.url}
        return {"model": model.info.name or self._reference} | running_facts(model)

    def shut_down(self, timeout: float) -> bool:
        """End the thread and close the model; False if it does not come to that within ``timeout`` seconds.

        Once it does, it has longer: conversations may have to be written to a slow disk.
        """
        self.stop()
        self._commands.put(None)
        if self.is_alive():
            self.join(timeout)
            if self._closes.is_set():
                self.join(_WRITING_SECONDS)
        return not self.is_alive()

    # the thread

    def run(self) -> None:
        """Obey commands until None comes."""
        while (command := self._commands.get()) is not None:
            command()
        self._closes.set()
        self._close()

    def _post(self, message: Message) -> None:
        # The screen may be gone already when the engine comes back.
        with contextlib.suppress(RuntimeError):
            self._post_message(message)

    def _close(self) -> None:
        model, self._model, self._experts = self._model, None, None
        if model is not None:
            model.close()

    def _load(self, reference: str, options: dict[str, Any], stop: Stop, number: int) -> None:
        told = 0.0
        fail = functools.partial(self._fail, reference, number)

        def progress(phase: str, share: float) -> None:
            nonlocal told
            if stop.is_set():
                raise Cancelled
            if (now := time.monotonic()) - told > _PROGRESS_SECONDS:
                told = now
                self._post(LoadProgressed(phase, min(max(share, 0.0), 1.0)))

        try:
            if stop.is_set():
                raise Cancelled
            # what cannot be had, or be read, leaves the model that is there
            self._finder(reference, progress)
            self._close()
            model = self._loader(reference, progress=progress, **with_sessions(options))
        except Cancelled:
            fail("loading was cancelled", cancelled=True)
        except MobileError as error:
            fail(python_words(str(error)), about_option=isinstance(error, UsageError))
        except Exception as error:  # whatever it is, the screen must live to show it
            fail(unexpected(error))
        else:
            self._reference = reference
            self._model, self._experts = model, (experts := model.experts())
            name, expert_bytes, asked = _about(model)
            notices = list(map(with_flags, model.notices))
            loaded = ModelLoaded(
                reference, name or reference, expert_bytes, model.stats(), notices, experts, asked, number
            )
            self._post(loaded)

    def _fail(
        self,
        reference: str,
        number: int,
        error: str,
        *,
        cancelled: bool = False,
        about_option: bool = False,
    ) -> None:
        kept = self._model is not None
        self._post(LoadFailed(reference, error, cancelled, kept, about_option, number))

    def _generate(
        self, answer_id: int, messages: list[dict[str, Any]], options: dict[str, Any], stop: Stop
    ) -> None:
        model = self._model
        last: Chunk | None = None
        error = ""
        try:
            if model is None:
                raise MobileError("no model is loaded")
            last = self._stream(model, Outbox(answer_id), messages, options, stop)
        except MobileError as failure:
            error = python_words(str(failure))
            if isinstance(failure, PromptTooLongError):
                error += f" · {way_out(options, '/set n_ctx and /reload make room', '/new')}"
        except Exception as failure:
            error = unexpected(failure)
        facts: dict[str, Any] = {}
        with contextlib.suppress(MobileError):
            if model is not None:
                facts = model.stats()
        reason = (last.finish_reason if last is not None else None) or INTERRUPTED
        self._post(
            AnswerEnded(
                answer_id,
                "error" if error else reason,
                last.receipt if last is not None else None,
                last.tokens_per_second if last is not None else 0.0,
                last.prompt_tokens if last is not None else 0,
                last.completion_tokens if last is not None else 0,
                error,
                facts,
            )
        )

    def _stream(
        self,
        model: Model | RemoteModel,
        outbox: Outbox,
        messages: list[dict[str, Any]],
        options: dict[str, Any],
        stop: Stop,
    ) -> Chunk | None:
        last: Chunk | None = None
        before, started = Receipt(), time.perf_counter()
        answer = model.stream_chat(
            messages,
            should_stop=stop.is_set,
            on_prompt=lambda done, total: self._post(PromptProgressed(outbox.answer_id, done, total)),
            **of_a_chat(options),
        )
        with contextlib.closing(answer) as chunks, contextlib.closing(Follower(model.experts())) as follower:
            for chunk in chunks:
                now = time.perf_counter()
                token = _token(chunk, before, now - started)
                before, started, last = chunk.receipt, now, chunk
                if outbox.put(token, follower.take(self.watching), chunk.tokens_per_second):
                    self._post(AnswerProgressed(outbox))
        return last


def _about(model: Model | RemoteModel) -> tuple[str, list[int], dict[str, Any]]:
    """A model's name, the bytes of an expert by layer, and the sampling that its file asks for."""
    if isinstance(model, RemoteModel):
        return model.name, [0] * len(model.experts().layers), {}
    each = [sum(layer.matrix_bytes) for layer in model.info.expert_layers]
    return model.info.name or "", each, recommended(model.info)[0]


class Follower:
    """Takes what tokens ask for while somebody looks: an answer must not fail because of its picture."""

    def __init__(self, experts: Experts | RemoteExperts) -> None:
        self._experts = experts
        self._watch: Watch | RemoteWatch | None = None

    def take(self, watching: bool) -> Asked | None:
        """What was asked for since the last call; None if nobody looked."""
        asked = self._watch.take() if self._watch is not None else None
        if not watching:
            self.close()
        elif self._watch is None:
            with contextlib.suppress(EngineMemoryError):
                self._watch = self._experts.watch()
        return asked

    def close(self) -> None:
        """Nobody looks any more."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()


def _token(chunk: Chunk, before: Receipt, seconds: float) -> Token:
    after = chunk.receipt
    kinds = [kind for kind in Pass if _count(after, kind) > _count(before, kind)]
    moved = after.bytes_read - before.bytes_read
    moved += getattr(after, "bytes_uploaded", 0) - getattr(before, "bytes_uploaded", 0)
    return Token(chunk.text, kinds[0].value if kinds else "", seconds, max(0, moved), chunk.reasoning)


def _count(receipt: Receipt, kind: Pass) -> int:
    return getattr(receipt, f"tokens_{kind.value}")


def unexpected(error: Exception) -> str:
    """An error that nobody foresaw, in a line."""
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text}" if text else f"unexpected {type(error).__name__}"
