"""What the engine is told of decodes whose tokens are drafted, or run for a draft, over a made-up engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mobile_gguf.generate.context.decoder import Decoder, Slice


class Told:
    """An engine, and the calls that run its decodes: keeps what they are told, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def set_guessed(self, ctx: int, guessed: str) -> None:
        self.told.append(guessed)

    def refuse(self, ctx: int, places: Sequence[int]) -> None:
        self.told.append(list(places))

    def set_n_expert_used(self, ctx: int, k: int) -> None:
        pass

    def set_batch_n_expert_used(self, ctx: int, k: Sequence[int]) -> None:
        pass

    def decode(self, batch: Any) -> None:
        self.told.append("decode")


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def decoder(told: Told) -> Decoder:
    made: Any = Decoder
    return made(SimpleNamespace(n_batch=16, ctx=1), told, told, False)


def token(number: int) -> Slice:
    return Slice(number, 8, [5])


def guess(number: int) -> Slice:
    return Slice(number, 8, [5], 2, is_guess=True)


def draft(number: int) -> Slice:
    return Slice(number, 8, [5, 6, 7], every_output=True, is_drafted=True)


def test_a_text_without_drafts_tells_nothing(decoder: Decoder, told: Told) -> None:
    decoder.run([token(0)])
    decoder.refuse([0])
    assert told.told == ["decode"]


def test_what_a_draft_is_found_by_is_told_once_and_refused_by_nobody(decoder: Decoder, told: Told) -> None:
    """The engine itself takes it back, after the draft."""
    decoder.run([guess(0)])
    decoder.run([guess(0)])
    decoder.run([draft(0)])
    decoder.refuse([1, 2])
    decoder.run([token(0)])
    assert told.told == ["source", "decode", "decode", "draft", "decode", [1, 2], "none", "decode"]


def test_beside_others_it_is_refused_at_once(decoder: Decoder, told: Told) -> None:
    """Of several answers' tokens some are of the text."""
    decoder.run([guess(0), guess(1)])
    decoder.run([draft(0), guess(1), token(2), guess(3)])
    decoder.refuse([2])
    assert told.told == ["source", "decode", "draft", "decode", [3, 5], [2]]
