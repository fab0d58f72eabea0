"""Texts whose tokens want the experts that they are told to, with drafts in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny_models

MODEL = "qwen3moe"
SPEC = tiny_models.MODELS[MODEL]
Needs = Sequence[int]


class Script:
    """Ops of ``engine_child``: a text whose tokens want the experts that they are given, in every layer.

    No token comes twice, but for those whose ids are given.
    """

    def __init__(self) -> None:
        self.ops: list[dict[str, Any]] = []
        self.n_text = 0
        self._fresh = iter(range(100, tiny_models.VOCAB - 3))

    def text(self, *needs: Needs, ids: Sequence[int] | None = None) -> Script:
        """Tokens one by one."""
        self._run_singly(needs, ids)
        self.n_text += len(needs)
        return self

    def sought(self, *needs: Needs) -> Script:
        """Passes that are run for a draft, whose rows do not stay."""
        self.ops.append({"op": "set_guessed", "guessed": "source"})
        self._run_singly(needs, None)
        self.ops.append({"op": "set_guessed", "guessed": "none"})
        self.ops.append({"op": "remove", "pos": self.n_text})
        return self

    def drafted(
        self,
        token: Needs,
        *drafts: Needs,
        n_right: int = 0,
        refuses: bool = True,
        ids: Sequence[int] | None = None,
    ) -> Script:
        """A pass over a token and a draft, right so far; ``refuses``: the engine is told of the rest."""
        self._want([token, *drafts])
        n, n_said = 1 + len(drafts), 1 + n_right
        self.ops += [
            {"op": "set_guessed", "guessed": "draft"},
            {"op": "decode", "tokens": self._ids(n, ids), "pos": self.n_text},
            *([{"op": "refuse", "tokens": list(range(n_said, n))}] if refuses else []),
            {"op": "set_guessed", "guessed": "none"},
            {"op": "remove", "pos": self.n_text + n_said},
        ]
        self.n_text += n_said
        return self

    def and_(self, *ops: dict[str, Any]) -> Script:
        self.ops += ops
        return self

    def _want(self, needs: Sequence[Needs]) -> None:
        """A replay has ids for each place of a text: those before are there already."""
        of_places = [*[needs[0]] * self.n_text, *needs]
        ids = [[list(experts)] * SPEC.n_layer_moe for experts in of_places]
        self.ops.append({"op": "replay", "ids": ids})

    def _run_singly(self, needs: Sequence[Needs], ids: Sequence[int] | None) -> None:
        self._want(needs)
        self.ops.append({"op": "steps", "tokens": self._ids(len(needs), ids), "pos": self.n_text})

    def _ids(self, n: int, ids: Sequence[int] | None) -> list[int]:
        found = list(ids) if ids is not None else [next(self._fresh) for _ in range(n)]
        assert len(found) == n
        return found
