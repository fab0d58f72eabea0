"""What becomes of a chat that is longer than the context: its oldest turns are left out.

Pure: messages in, messages and a number out. A turn begins with a user's message and ends before the next
one, with all that the model and its tools said to it. What the system says is never left out, and the last
turn is the question. Turns go in blocks, so that the next questions find the same beginning, and with it the
keys and values that are computed already, instead of another one each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mobile_gguf.errors import PromptTooLongError
from mobile_gguf.generate.form.form import Form
from mobile_gguf.options.words import TRIM

Message = dict[str, Any]

# Room for an answer whose length nobody has asked for; never more than a share of the context.
_ANSWER_TOKENS = 512
_ANSWER_SHARE = 8
# Once turns have to go, so many are left out that this share of the room is used.
_LOW_SHARE = 0.75
_MESSAGE_TOKENS = 8  # of a template, about, around each message
_FIXED_ROLES = ("system", "developer")


class ChatPrompt(list[int]):
    """The tokens of a chat, how many of its oldest turns were left out for want of context, and in what form
    its answer is, where that is known."""

    def __init__(self, tokens: Sequence[int], turns_left_out: int = 0) -> None:
        super().__init__(tokens)
        self.turns_left_out = turns_left_out
        self.form: Form | None = getattr(tokens, "form", None)  # of a Prompt


def of_a_chat(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an answer in a chat that goes on: it trims where nothing else was asked for."""
    asked = options.get("context_full")
    return {**options, "context_full": TRIM if asked in (None, "auto") else asked}


def way_out(options: Mapping[str, Any], make_room: str, begin_again: str) -> str:
    """What helps a chat whose question found no room, in the words of the chat it is."""
    ways = [make_room, f"{begin_again} begins again"]
    if of_a_chat(options)["context_full"] != TRIM:
        ways.insert(0, "/set context_full trim leaves out the oldest turns")
    return ", ".join(ways)


def reserve_for(n_ctx: int, max_tokens: int | None) -> int:
    """Tokens that are kept free for the answer: what was asked for, within an eighth of the context."""
    asked = _ANSWER_TOKENS if max_tokens is None or max_tokens < 0 else max_tokens
    return min(asked, n_ctx // _ANSWER_SHARE)


def fit_chat(
    messages: Sequence[Message],
    render: Callable[[list[Message]], list[int]],
    count: Callable[[str], int],
    room: int,
) -> ChatPrompt:
    """The prompt of ``messages`` without the oldest turns that have to go to make it ``room`` tokens.

    ``render`` makes tokens of messages, ``count`` says how many a text has. One turn that is longer than that
    is returned as it is.
    """
    turns = split_turns(messages)
    try:
        tokens = render(list(messages))
    except PromptTooLongError:  # so long that nothing was counted
        if len(turns) < 2:
            raise
        tokens = []
    else:
        if len(tokens) <= room or len(turns) < 2:
            return ChatPrompt(tokens)
    sizes = [sum(_MESSAGE_TOKENS + count(_text(messages[at])) for at in turn) for turn in turns]
    n = turns_to_leave_out(sizes, max(0, len(tokens) - sum(sizes)), room)
    while True:
        is_last = n == len(turns) - 1
        try:
            tokens = render(without_turns(messages, n))
            if is_last or len(tokens) <= room:
                return ChatPrompt(tokens, n)
        except PromptTooLongError:
            if is_last:
                raise
        n += 1


def split_turns(messages: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The places of the messages of each turn; those of the system are in none."""
    turns: list[list[int]] = []
    for at, message in enumerate(messages):
        if message["role"] in _FIXED_ROLES:
            continue
        if not turns or message["role"] == "user":
            turns.append([])
        turns[-1].append(at)
    return turns


def turns_to_leave_out(sizes: Sequence[int], fixed: int, room: int) -> int:
    """How many of the oldest turns go, so that the others and ``fixed`` tokens are at most ``room``.

    The chat is played again turn by turn: as long as it is only appended to, the answer stays the same until
    the next block of turns has to go. The last turn stays in any case.
    """
    n, used = 0, fixed
    for at, size in enumerate(sizes):
        used += size
        if used > room:
            while n < at and used > room * _LOW_SHARE:
                used -= sizes[n]
                n += 1
    return n


def without_turns(messages: Sequence[Message], n: int) -> list[Message]:
    """``messages`` without their ``n`` oldest turns."""
    left_out = {at for turn in split_turns(messages)[:n] for at in turn}
    return [message for at, message in enumerate(messages) if at not in left_out]


def _text(message: Message) -> str:
    said = [value for name, value in message.items() if name != "role" and value]
    return "\n".join(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for value in said
    )
