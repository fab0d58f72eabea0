"""A conversation that grows turn by turn; what the context has no room for is left out, and kept here."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .context import of_a_chat
from .messages import as_answer, as_messages

if TYPE_CHECKING:
    from mobile_gguf.generate.answer.answer import Chunk

    from .model import Model


@dataclass
class Conversation:
    """A chat with a model: an optional system message, then turns of user and assistant."""

    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system one first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, model: Model, text: str, **options: Any) -> Generator[Chunk, None, None]:
        """Stream the answer to ``text``; the turn is kept with what was answered, even if that was cut short.

        A turn that fails is taken back. The oldest turns are left out where the context has no room for all,
        unless ``context_full`` is ``stop``; they stay in ``turns``.
        """
        as_messages(text)
        self.turns.append({"role": "user", "content": text})
        said = thought = ""
        try:
            for chunk in model.stream_chat(self.messages, **of_a_chat(options)):
                said += chunk.text
                thought += chunk.reasoning
                yield chunk
        except Exception:
            self.turns.pop()
            raise
        except BaseException:  # Ctrl-C, or the consumer had enough
            self.turns.append(as_answer(said, thought))
            raise
        self.turns.append(as_answer(said, thought))

    def clear(self) -> None:
        """Forget the turns; the system message stays."""
        self.turns.clear()
