"""What the chat screen knows, and what its commands may ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..store.session import Session
from ..widgets.prompt import Prompt
from ..widgets.turn_view import AnswerView
from .steady import SteadyScreen

if TYPE_CHECKING:
    from ..app import ChatApp

IDLE, LOADING, ANSWERING = "idle", "loading", "answering"


class ChatState(SteadyScreen[None]):
    """The state, which only the screen's handlers change; the methods are the screen's."""

    app: ChatApp
    session: Session

    def __init__(self) -> None:
        super().__init__()
        self.state = IDLE
        self.reference = ""
        self.model_name = ""
        self.facts: dict[str, Any] = {}
        self.context_used = 0
        self.coloured = False
        self._answer: AnswerView | None = None
        self._answer_id = 0
        self._started = 0.0
        self._prompt_done = ""  # how far the prompt is, in words
        self._drafted = 0.0  # when the words so far were saved
        self._wanted = ""  # the model that is looked for or loading
        self._finding = False  # it is looked for, and nothing else is going on
        self._load_number = 0
        self._before = ""  # the model that a failed load has cost
        self._map_wanted: bool | None = None  # None: by the width
        self._editing: int | None = None
        self._pending = ""  # asked while the model was loading

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def busy(self) -> bool:
        """Whether the engine is at work."""
        return self.state != IDLE

    def load_model(self, reference: str) -> None:
        """Load a model, in place of the one that is there."""
        raise NotImplementedError

    async def cut(self, position: int) -> None:
        """Forget the turns from ``position`` on, on the screen as well."""
        raise NotImplementedError

    async def show_session(self) -> None:
        """Draw the conversation that the session holds."""
        raise NotImplementedError

    def edit(self, position: int) -> None:
        """Put a question back into the prompt; sending it replaces it and all that followed."""
        raise NotImplementedError

    async def regenerate(self, position: int) -> None:
        """Answer again from the question before ``position``."""
        raise NotImplementedError

    def action_stop(self) -> None:
        """End what is going on: completion, editing, the answer or loading."""
        raise NotImplementedError

    def _end_editing(self) -> None:
        raise NotImplementedError
