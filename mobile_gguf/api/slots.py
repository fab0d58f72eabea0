"""The sequences of a context by their numbers, as llama-server's slots: what each holds, saved and restored.

Which sequence an answer is made in is nobody's choice: the one that has most of its prompt. So a slot that is
restored is where a prompt that begins like it goes on, whatever its number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.wording import why

if TYPE_CHECKING:
    from mobile_gguf.generate.context.cells import Cells
    from mobile_gguf.generate.sessions.sessions import Sessions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Slot:
    """A sequence: its tokens, and whether an answer is made in it."""

    number: int
    n_tokens: int
    is_busy: bool


class Slots:
    """Those of a loaded model; all of this is for the thread that decodes."""

    def __init__(self, sequences: Sequence[Cells], sessions: Sessions | None) -> None:
        self._sequences = sequences
        self._sessions = sessions

    def all(self) -> list[Slot]:
        """Every slot."""
        return [Slot(one.number, len(one.tokens), one.is_taken) for one in self._sequences]

    def save(self, number: int, name: str) -> tuple[int, int]:
        """Write what a slot holds under ``name``; returns its tokens and the file's bytes.

        Raises MobileError.
        """
        sessions, name = self._disk(), _checked(name)
        kept = self._idle(number).copied()
        if kept is None:
            raise UsageError(f"slot {number} is empty: there is nothing to save")
        try:
            return len(kept.tokens), sessions.save_as(name, kept)
        except OSError as error:
            raise MobileError(f"{name} is not saved: {why(error)}") from None

    def restore(self, number: int, name: str) -> tuple[int, int]:
        """Have a slot hold what was saved; returns its tokens and the file's bytes. Raises MobileError."""
        sessions, name = self._disk(), _checked(name)
        sequence = self._idle(number)
        try:
            kept, n_bytes = sessions.read_as(name)
        except OSError as error:
            raise MobileError(f"{name} cannot be read: {why(error)}") from None
        if not sequence.replace_by(kept) or not sequence.tokens:
            raise UsageError(f"the context has no room for the {len(kept.tokens)} tokens of {name} now")
        return len(kept.tokens), n_bytes

    def erase(self, number: int) -> int:
        """Empty a slot; returns the tokens that it had."""
        sequence = self._idle(number)
        n = len(sequence.tokens)
        sequence.forget()
        return n

    def _idle(self, number: int) -> Cells:
        if not 0 <= number < len(self._sequences):
            raise UsageError(f"there is no slot {number}: they are numbered 0 to {len(self._sequences) - 1}")
        sequence = self._sequences[number]
        if sequence.is_taken:
            raise UsageError(f"an answer is being made in slot {number}: try again when it has ended")
        return sequence

    def _disk(self) -> Sessions:
        if self._sessions is None:
            raise UsageError("slots are saved beside conversations: --session-cache is off")
        return self._sessions


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError("the name of a saved slot must be letters, digits, '.', '_' and '-', at most 100")
    return name
