"""A model behind an OpenAI server, as far as a chat needs one: what ``Model`` is for a file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobile_gguf.api.messages import Messages, as_messages
from mobile_gguf.errors import ModelNotFoundError, UsageError
from mobile_gguf.generate.answer.answer import INTERRUPTED, LENGTH, STOP, Chunk
from mobile_gguf.generate.answer.receipt import Loss, Receipt, Speculation
from mobile_gguf.options import POLICY_OPTIONS, GenerateOptions, LoadOptions, make_options
from mobile_gguf.wording import plain

from .connection import RemoteError, Server
from .experts import RemoteExperts

_OURS = "mobile-gguf"
# What every server takes; others of ours are for servers of ours.
_OF_ALL = ("max_tokens", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty")
_SHOWN = 12  # models of a server in an error


@dataclass(frozen=True)
class PlainReceipt(Receipt):
    """The receipt of a server that gives none: how many tokens, and how fast they came."""

    n_tokens: int = 0

    def summary(self, tokens_per_second: float | None = None) -> str:
        tokens = f"{self.n_tokens} token{'' if self.n_tokens == 1 else 's'}"
        return tokens if not tokens_per_second else f"{tokens} | {tokens_per_second:.1f} tok/s"


def listed(server: Server) -> list[dict[str, Any]]:
    """The models that a server has, as it says. Raises RemoteError."""
    said = server.get(f"{server.api}/models")
    data = said.get("data") if isinstance(said, dict) else None
    if not isinstance(data, list):
        raise RemoteError(f"{server.url} does not list models as OpenAI's API does")
    return [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)]


def attach(server: Server, name: str | None) -> RemoteModel:
    """The model ``name`` of a server, None for the one that it has.

    Raises RemoteError, ModelNotFoundError if it has none of that name, UsageError if one has to be chosen.
    """
    known = listed(server)
    names = [one["id"] for one in known]
    shown = ", ".join(map(plain, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    if name is not None:
        card = next((one for one in known if one["id"] == name), None)
        if card is None:
            raise ModelNotFoundError(f"{server.url} has no model {plain(name)}: it has {shown or 'none'}")
    elif not known:
        raise ModelNotFoundError(f"{server.url} has no model")
    elif len(known) == 1 or all(one.get("owned_by") == _OURS for one in known):
        card = known[0]  # the others are further names of it
    else:
        raise UsageError(f"{server.url} has several models, give one by --model: {shown}")
    picture = server.get(f"{server.root}/v1/experts") if card.get("owned_by") == _OURS else None
    return RemoteModel(server, card, picture)


class RemoteModel:
    """One model of a server; made by ``attach``.

    ``is_ours``: a mobile-gguf server, which takes all options of an answer and gives receipts and its map.
    """

    sessions = None

    def __init__(self, server: Server, card: dict[str, Any], picture: dict[str, Any] | None) -> None:
        self.server = server
        self.id: str = card["id"]
        self.is_ours = card.get("owned_by") == _OURS
        self.meta: dict[str, Any] = card["meta"] if isinstance(card.get("meta"), dict) else {}
        self.name = plain(str(self.meta.get("name") or self.id)) if self.is_ours else plain(self.id)
        self.options = LoadOptions()
        self.defaults = GenerateOptions()
        self.notices: list[str] = []
        self.n_ctx = _whole(self.meta.get("n_ctx"))
        self._changes: dict[str, Any] = {}
        has_map = self.is_ours and picture is not None and bool(picture.get("tiers"))
        self._experts = RemoteExperts(server, picture if has_map else None)

    mode = property(lambda self: self._setting("mode"))
    gamma = property(lambda self: self._setting("gamma"))
    little_k = property(lambda self: self._setting("little_k"))

    def _setting(self, name: str) -> Any:
        return self._changes.get(name, self.meta.get(name))

    def configure(self, **changes: Any) -> None:
        """Set what decides which experts a token uses, for the answers to come. Raises UsageError."""
        if not self.is_ours:
            raise UsageError(f"{self.server.url} is no mobile-gguf server: it has no {', '.join(changes)}")
        for name in changes:
            if name not in POLICY_OPTIONS:
                raise UsageError(f"{name} cannot be configured: only {', '.join(POLICY_OPTIONS)} can")
        make_options(LoadOptions, changes)
        self._changes |= changes

    def stats(self) -> dict[str, Any]:
        """What the server says of the model."""
        known = {name: value for name, value in self.meta.items() if not isinstance(value, (dict, list))}
        said = {"server": self.server.url, "model": self.id, **known}
        return said | {"mode": self.mode or "", "n_ctx": self.n_ctx, "little_k": self.little_k}

    def experts(self) -> RemoteExperts:
        """The live view of the experts, where the server has one."""
        return self._experts

    def close(self) -> None:
        """Nothing is asked any more."""
        self._experts.close()

    def __enter__(self) -> RemoteModel:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def stream_chat(
        self,
        messages: Messages,
        *,
        should_stop: Callable[[], bool] | None = None,
        on_prompt: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> Generator[Chunk, None, None]:
        """Answer ``messages``, yielding a Chunk for each event of the server; ends as ``Model``'s does.

        Raises RemoteError.
        """
        del on_prompt  # no server tells it
        body = self.body(as_messages(messages), options)
        answer = _Answer(self.is_ours)
        for event in self.server.events(f"{self.server.api}/chat/completions", body, should_stop):
            if (chunk := answer.add(event)) is not None:
                yield chunk
        is_cut = should_stop is not None and should_stop()
        if not (is_cut or answer.is_whole):
            raise RemoteError(f"{self.server.url} broke off before the answer was at its end")
        yield answer.last()

    def body(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
        """The request for an answer, with the options that this server knows."""
        checked = vars(make_options(GenerateOptions, {**self._changes, **options}))
        asked = {name: checked[name] for name in {**self._changes, **options}}
        known = {name: value for name, value in asked.items() if self.is_ours or name in _OF_ALL}
        values = {name: _plain_value(value) for name, value in known.items() if value is not None}
        extras = {"continuous_usage_stats": True} if self.is_ours else {}
        return {
            "model": self.id,
            "messages": [message if self.is_ours else _without_thoughts(message) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True, **extras},
            **values,
        }


class _Answer:
    """Makes chunks of a server's events."""

    def __init__(self, is_ours: bool) -> None:
        self._is_ours = is_ours
        self._begun = time.monotonic()
        self._first: float | None = None
        self._n_events = 0
        self._usage: dict[str, Any] = {}
        self._reason: str | None = None

    def add(self, event: dict[str, Any]) -> Chunk | None:
        """What an event adds; None if that is no text."""
        if isinstance(event.get("usage"), dict):
            self._usage = event["usage"]
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return None
        self._reason = choice.get("finish_reason") or self._reason
        delta = choice.get("delta") or choice.get("message") or {}
        text = _text(delta.get("content"))
        thought = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        if not (text or thought):
            return None
        self._n_events += 1
        self._first = self._first if self._first is not None else time.monotonic()
        return self._chunk(text, None, thought)

    @property
    def is_whole(self) -> bool:
        """Whether the server has said how it ended."""
        return self._reason is not None

    def last(self) -> Chunk:
        """The last chunk, which says how it ended."""
        return self._chunk("", {"length": LENGTH, None: INTERRUPTED}.get(self._reason, STOP))

    def _chunk(self, text: str, finish_reason: str | None, thought: str = "") -> Chunk:
        n_prompt = _whole(self._usage.get("prompt_tokens"))
        n_tokens = _whole(self._usage.get("completion_tokens")) or self._n_events
        seconds = time.monotonic() - (self._first if self._first is not None else self._begun)
        rate = self._usage.get("tokens_per_second")
        if not isinstance(rate, (int, float)) or isinstance(rate, bool):
            # between the first and the last of them
            rate = (n_tokens - 1) / seconds if n_tokens > 1 and seconds > 0 else 0.0
        said = self._usage.get("receipt") if self._is_ours else None
        receipt = receipt_of(said) if isinstance(said, dict) else PlainReceipt(mode="", n_tokens=n_tokens)
        rate = float(rate)
        return Chunk(text, None, n_prompt, n_tokens, rate, finish_reason, receipt, reasoning=thought)


def receipt_of(said: Mapping[str, Any]) -> Receipt:
    """A receipt from its JSON; what another version has besides is left out."""
    values = _known(Receipt, said)
    loss, drafts = values.pop("loss", None), values.pop("speculation", None)
    if isinstance(loss, dict):
        values["loss"] = Loss(**_known(Loss, loss))
    if isinstance(drafts, dict) and "source" in drafts:
        values["speculation"] = Speculation(**_known(Speculation, drafts))
    return Receipt(**values)


def _known(kind: type[Any], said: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(kind)}
    return {name: value for name, value in said.items() if name in names}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _without_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as any server takes it: some refuse what was thought, which is not of OpenAI's API."""
    return {name: value for name, value in message.items() if name != "reasoning_content"}


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
