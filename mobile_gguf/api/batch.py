"""Many prompts from a JSONL file, answered into another in order: resumable, a bad line costs only itself.

An input line is ``{"prompt": ...}`` or ``{"messages": [...]}`` with an optional ``id`` and any of
GenerateOptions. The output has one line for each, in the same order; its ``key`` says what was answered with
which settings, so that a file of something else is never gone on with.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.atomic import disk_errors
from mobile_gguf.files.lock import try_lock
from mobile_gguf.generate.answer.answer import INTERRUPTED, Chunk
from mobile_gguf.options import GenerateOptions, make_options
from mobile_gguf.wording import why

from .messages import as_messages
from .model import Model

_OWN = ("id", "prompt", "messages", "system")
_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class BatchItem:
    """An input line; ``number`` counts from 1 with blank lines. ``error`` says what is wrong with it."""

    number: int
    text: str
    id: Any = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""

    def key(self, settings: str) -> str:
        """Names the line's text together with ``settings``, which say how all lines are answered."""
        return hashlib.sha256(f"{settings}\n{self.text}".encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class BatchStatus:
    """How far a run is; ``n_before`` of the lines done were there already, ``n_tokens`` are this run's.

    With drafts a decode of several tokens was to take ``predicted_ms`` on average, and took ``measured_ms``.
    """

    n_lines: int
    n_before: int
    n_done: int
    n_failed: int
    n_tokens: int
    predicted_ms: float | None = None
    measured_ms: float | None = None


def read_items(lines: Iterable[bytes], options: Mapping[str, Any], system: str | None) -> list[BatchItem]:
    """Read input lines; ``options`` and ``system`` are for those that say nothing else.

    Blank lines are left out. A line that cannot be answered is an item with ``error``.
    """
    items = []
    for number, raw in enumerate(lines, 1):
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape").strip()
        if text:
            try:
                items.append(_read_item(number, text, options, system))
            except UsageError as error:
                items.append(BatchItem(number, text, _id_of(text), error=str(error)))
    return items


def settings_of(model: str, raw: bool, mode: Mapping[str, Any]) -> str:
    """What of a command decides the answers beside each line: the model, the template, policy options."""
    return json.dumps([model, raw, dict(mode)], sort_keys=True, default=str)


class OutputFile:
    """The output, opened to go on: complete lines are kept, a last one that was cut off is removed.

    One process may write it at a time. Raises UsageError if what is there does not belong to ``keys``.
    """

    def __init__(self, path: Path, keys: list[str], *, overwrite: bool = False) -> None:
        self.path = path
        self.n_before = 0
        self.n_failed_before = 0
        with disk_errors(path, remedy=""):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
            try:
                if not try_lock(self._file.fileno()):
                    raise MobileError(f"cannot write {path}: another process is writing it now")
                if overwrite:
                    self._file.truncate(0)
                self._file.truncate(self._kept(keys))
                self._file.seek(0, os.SEEK_END)
            except BaseException:
                self._file.close()
                raise

    def _kept(self, keys: list[str]) -> int:
        """Bytes of the complete lines; counts them."""
        end = 0
        with open(self.path, "rb") as file:
            for raw in file:
                answer = _json_object(raw) if raw.endswith(b"\n") else None
                if answer is None:
                    if file.read(1):
                        raise self._foreign(f"line {self.n_before + 1} is no answer")
                    break
                if self.n_before >= len(keys):
                    raise self._foreign(f"it has more lines than the input, {len(keys)}")
                if answer.get("key") != keys[self.n_before]:
                    raise self._foreign(f"line {self.n_before + 1} answers another line, model or settings")
                self.n_before += 1
                self.n_failed_before += bool(answer.get("error"))
                end += len(raw)
        return end

    def _foreign(self, why: str) -> UsageError:
        return UsageError(
            f"{self.path} cannot be gone on with: {why}; give another --out, or --overwrite to begin again"
        )

    def write(self, answer: dict[str, Any]) -> None:
        """Add a line, at once."""
        view = memoryview(_encoded(answer))
        with disk_errors(self.path, remedy="; the same command goes on from here"):
            while view:
                view = view[self._file.write(view) :]

    def close(self) -> None:
        self._file.close()


class StreamOutput:
    """The same on standard output, a pipe or a device, which cannot be gone on with."""

    n_before = n_failed_before = 0

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    @classmethod
    def open(cls, path: Path) -> StreamOutput:
        """A path that is no regular file. Raises MobileError."""
        with disk_errors(path, remedy=""):
            return cls(open(path, "wb", buffering=0))

    def write(self, answer: dict[str, Any]) -> None:
        try:
            self._stream.write(_encoded(answer))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MobileError(f"cannot write the answers: {why(error)}") from error

    def close(self) -> None:
        """Nothing: each line is out already, and standard output is not ours to close."""


def run_batch(
    model: Model,
    items: list[BatchItem],
    keys: list[str],
    output: OutputFile | StreamOutput,
    *,
    raw: bool = False,
    on_token: Callable[[BatchStatus], None] | None = None,
) -> BatchStatus:
    """Answer the items that ``output`` does not have yet, as many at once as the model does, in order.

    What a line does wrong (a prompt that is too long) is written as its error; an error of the engine or the
    disk ends the run, and so does Ctrl-C, as KeyboardInterrupt: answers in the making are not written, nor
    those behind them. ``raw``: prompts are continued as they are, without the chat template.
    """
    return _Run(model, items, keys, output, raw, on_token or (lambda _status: None)).all()


class _Run:
    """The answering of a batch."""

    def __init__(
        self,
        model: Model,
        items: list[BatchItem],
        keys: list[str],
        output: OutputFile | StreamOutput,
        raw: bool,
        tell: Callable[[BatchStatus], None],
    ) -> None:
        self._model, self._items, self._keys, self._output = model, items, keys, output
        self._raw, self._tell = raw, tell
        self._n_done, self._n_failed = output.n_before, output.n_failed_before
        self._n_tokens = 0  # of all answers that are begun
        self._answers: dict[int, dict[str, Any]] = {}  # that those before them are waited for
        self._error: BaseException | None = None

    def _status(self) -> BatchStatus:
        predicted, measured = self._model.crew.iteration_ms or (None, None)
        return BatchStatus(
            len(self._items),
            self._output.n_before,
            self._n_done,
            self._n_failed,
            self._n_tokens,
            predicted,
            measured,
        )

    def all(self) -> BatchStatus:
        self._tell(self._status())
        crew, begun = self._model.crew, self._n_done
        try:
            while self._error is None and self._n_done < len(self._items):
                while self._error is None and begun < len(self._items) and crew.n_running < crew.most:
                    crew.spawn(functools.partial(self._answer, begun))
                    begun += 1
                    self._write()
                crew.advance()
                self._write()
        finally:
            crew.stop()
        if self._error is not None:
            raise self._error
        return self._status()

    def _write(self) -> None:
        while (answer := self._answers.pop(self._n_done, None)) is not None:
            self._output.write(answer | {"key": self._keys[self._n_done]})
            self._n_done += 1
            self._n_failed += bool(answer["error"])
            self._tell(self._status())

    def _answer(self, index: int) -> None:
        item = self._items[index]
        answer: dict[str, Any] = {"line": item.number, "id": item.id}
        last: Chunk | None = None
        try:
            if item.error:
                raise UsageError(item.error)
            pieces = []
            for chunk in _stream(self._model, item, self._raw):
                self._n_tokens += chunk.completion_tokens - (
                    last.completion_tokens if last is not None else 0
                )
                last = chunk
                pieces.append(chunk.text)
                self._tell(self._status())
            if last is None or last.finish_reason == INTERRUPTED:
                raise KeyboardInterrupt
            answer |= _answered("".join(pieces), last)
        except UsageError as error:
            answer |= _failed(str(error))
        except BaseException as error:  # what ends one ends all
            self._error = self._error or error
            return
        self._answers[index] = answer


def _stream(model: Model, item: BatchItem, raw: bool) -> Iterable[Chunk]:
    # a system message has no place in a plain prompt: such a line is a chat
    if raw and item.prompt is not None and len(item.messages or ()) == 1:
        return model.stream(item.prompt, **item.options)
    return model.stream_chat(item.messages or [], **item.options)


def _answered(text: str, last: Chunk) -> dict[str, Any]:
    return {
        "text": text,
        "finish_reason": last.finish_reason,
        "usage": {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens},
        "tokens_per_second": round(last.tokens_per_second, 3),
        "receipt": last.receipt.to_dict(),
        "error": None,
    }


def _failed(error: str) -> dict[str, Any]:
    empty = dict.fromkeys(("text", "finish_reason", "usage", "tokens_per_second", "receipt"))
    return empty | {"error": " ".join(error.split())}


def _read_item(number: int, text: str, options: Mapping[str, Any], system: str | None) -> BatchItem:
    if len(text) > _LINE_BYTES:
        raise UsageError(f"the line is longer than {_LINE_BYTES} characters")
    values = _parsed(text)
    given = {name: value for name, value in values.items() if name not in _OWN}
    prompt, messages, own_system = (values.get(name) for name in ("prompt", "messages", "system"))
    if (prompt is None) == (messages is None):
        raise UsageError('a line needs either "prompt" or "messages"')
    if own_system is not None and (not isinstance(own_system, str) or messages is not None):
        raise UsageError('"system" is text beside a "prompt"; among "messages" it is one of them')
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError('"prompt" must be text, and not empty')
        before = own_system if own_system is not None else system
        listed = [{"role": "system", "content": before}] if before else []
        messages = [*listed, {"role": "user", "content": prompt}]
    elif not isinstance(messages, list):
        raise UsageError('"messages" must be a list of {"role": ..., "content": ...}')
    merged = {**options, **given}
    make_options(GenerateOptions, merged)
    return BatchItem(number, text, values.get("id"), prompt, as_messages(messages), merged)


def _parsed(text: str) -> dict[str, Any]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the line is no UTF-8 text") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the line is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError("the line is no JSON object")
    return values


def _id_of(text: str) -> Any:
    """The id of a line that is wrong elsewhere."""
    try:
        return _parsed(text).get("id")
    except UsageError:
        return None


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _encoded(answer: dict[str, Any]) -> bytes:
    # an unpaired surrogate of an input's id is no UTF-8, escapes are
    try:
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(answer).encode() + b"\n"
