"""A client of a soak: it has conversations, edits them, hangs up, and checks what it did wait for."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from typing import Any

import httpx

from .soak_server import SoakServer

TIMEOUT = 300.0
_CHAT = "/v1/chat/completions"
_MOST_MESSAGES = 12
_RESTARTED = "cut by a restart"
_WORDS = ("the", "old", "clock", "on", "our", "kitchen", "wall", "says", "that", "it", "is", "late")


class _CutError(Exception):
    """The server says that it is shutting down."""


class Client:
    """Asks again and again in a thread; ``problems`` are what should not have been.

    ``turns`` are places in line, by the server's generation; ``hits`` experts that receipts count, likewise.
    Of ``n_after_restart`` conversations that were gone on with after an orderly restart, ``n_went_on`` had a
    part of them in memory.
    """

    def __init__(self, server: SoakServer, seed: int, embeds: bool, modes: tuple[str, ...]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.turns: list[tuple[int, int, int]] = []
        self.hits: Counter[int] = Counter()
        self.n_sent = self.n_after_restart = self.n_went_on = 0
        self.longest_wait = 0.0
        self._server, self._embeds, self._modes = server, embeds, modes
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._run)
        self._end = 0.0
        self._generation = 0  # of the server that is asked
        self._said: list[dict[str, str]] = []
        self._said_to = 0  # the generation that answered last

    @property
    def n_ended(self) -> int:
        """Requests so far that came to an end of whatever kind."""
        return sum(list(self.outcomes.values()))

    def start(self, end: float) -> None:
        self._end = end
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=TIMEOUT) as http:
            while time.monotonic() < self._end:
                self._generation = self._server.generation
                if not self._server.up.wait(TIMEOUT) or self._generation != self._server.generation:
                    continue
                self.n_sent += 1
                try:
                    ask = self._embed if self._embeds and self._random.random() < 0.1 else self._ask
                    self.outcomes[ask(http)] += 1
                except Exception as error:  # whatever it is, it is a finding
                    is_cut = isinstance(error, (httpx.TransportError, _CutError))
                    if is_cut and self._generation != self._server.generation:
                        self.outcomes[_RESTARTED] += 1
                        continue
                    self.problems.append(f"{type(error).__name__}: {error}")
                    return

    def _embed(self, http: httpx.Client) -> str:
        texts = ["word " * self._random.randint(1, 9) for _ in range(self._random.randint(1, 4))]
        answer = http.post(f"{self._server.url}/v1/embeddings", json={"input": texts})
        if answer.status_code == 429:
            return self._full(answer)
        _check(answer)
        if len(answer.json()["data"]) != len(texts):
            raise RuntimeError(f"{len(texts)} texts, and other vectors: {answer.text:.200}")
        return "embedded"

    def _question(self) -> dict[str, str]:
        words = self._random.sample(_WORDS, 6)
        return {"role": "user", "content": f"Count to {self._random.randint(2, 99)}: {' '.join(words)}."}

    def _prompt(self) -> list[dict[str, str]]:
        """The next turn of the conversation, one of its turns anew, another end of it, or another one."""
        said, places = self._said, [i for i, one in enumerate(self._said) if one["role"] == "user"]
        kind = self._random.choice(["new", "goes on", "goes on", "goes on", "edit", "again"])
        if not said or kind == "new" or len(said) > _MOST_MESSAGES:
            self._said_to = self._generation
            return [self._question()]
        if kind == "edit":
            return [*said[: self._random.choice(places)], self._question()]
        return said[: places[-1] + 1] if kind == "again" else [*said, self._question()]

    def _ask(self, http: httpx.Client) -> str:
        stream = self._random.random() < 0.6
        leaves = self._random.random() < 0.4
        n, n_choices = self._random.randint(1, 12), self._random.choice([1, 1, 1, 2])
        body = {
            "messages": self._prompt(),
            "max_tokens": n,
            "n": n_choices,
            "stream": stream,
            "stream_options": {
                "include_usage": True,
                "continuous_usage_stats": self._random.random() < 0.5,
            },
            "mode": self._random.choice(self._modes),
            "logit_bias": {str(self._random.randint(0, 99)): self._random.randint(-100, 100)},
            "grammar": "root ::= [a-z ] root",  # has no end: every answer is as long as asked
        }
        url = self._server.url + _CHAT
        if not stream:
            timeout = self._random.uniform(0.01, 0.5) if leaves else TIMEOUT
            try:
                answer = http.post(url, json=body, timeout=timeout)
            except httpx.TimeoutException:
                if leaves:
                    return "left"
                raise
            if answer.status_code == 429:
                return self._full(answer)
            _check(answer)
            told = answer.json()
            return self._answered(body, told["usage"], told["choices"][0]["message"]["content"])
        with http.stream("POST", url, json=body) as answer:
            if answer.status_code == 429:
                return self._full(answer)
            if answer.status_code != 200:
                answer.read()
                _check(answer)
            events: list[str] = []
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                if leaves and len(events) > n // 2:
                    return "left"
        return self._streamed(body, events)

    def _full(self, answer: httpx.Response) -> str:
        if int(answer.headers["retry-after"]) < 1:
            raise RuntimeError("429 without a Retry-After")
        time.sleep(0.05)
        return "full"

    def _streamed(self, body: dict[str, Any], events: list[str]) -> str:
        if not events or events[-1] != "[DONE]":
            raise _CutError(f"a stream without an end: {events[-1:]}")
        chunks = [json.loads(event) for event in events[:-1]]
        if chunks and "error" in chunks[-1]:
            raise _CutError(str(chunks[-1])[:300])
        texts = [
            choice["delta"].get("content") or ""
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["index"] == 0
        ]
        return self._answered(body, chunks[-1].get("usage") or {}, "".join(texts))

    def _answered(self, body: dict[str, Any], usage: dict[str, Any], text: str) -> str:
        n = body["max_tokens"] * body["n"]
        if usage.get("completion_tokens") != n:
            raise RuntimeError(f"asked for {n} tokens, got {usage.get('completion_tokens')}")
        receipt, cached = usage["receipt"], usage["prompt_tokens_details"]["cached_tokens"]
        kinds = sum(receipt[f"tokens_{kind}"] for kind in ("big", "little", "fallback"))
        if kinds != n or not 0 <= cached <= usage["prompt_tokens"]:
            raise RuntimeError(f"counters that do not fit: {usage}")
        self.hits[self._generation] += receipt["expert_hits"] + receipt["expert_misses"]
        line = usage["queue"]
        self.turns.append((self._generation, line["turn"], line["number"]))
        self.longest_wait = max(self.longest_wait, line["wait_ms"] / 1e3)
        if self._said_to != self._generation and self._server.was_orderly(self._said_to, self._generation):
            self.n_after_restart += 1
            self.n_went_on += cached > 0
        self._said_to = self._generation
        self._said = [*body["messages"], {"role": "assistant", "content": text}]
        return "answered"


def _check(answer: httpx.Response) -> None:
    if answer.status_code == 503:
        raise _CutError(f"status 503: {answer.text:.200}")
    if answer.status_code != 200:
        raise RuntimeError(f"status {answer.status_code}: {answer.text:.200}")
