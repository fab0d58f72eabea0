"""The expert map as the server tells it: where every expert is, and what the last token asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mobile_gguf.api.model import Model
from mobile_gguf.engine.experts import Asked, Codes, Watch
from mobile_gguf.engine.structs import LOADING, RESIDENT

# A row is text, one character for each expert.
STATES = {"absent": "0", "loading": "1", "resident": "2", "hit": "3", "missed": "4"}
_CODES = {name: ord(character) for name, character in STATES.items()}


class ExpertMap:
    """Tells of a Model's experts, to any thread; ``answering`` and ``add_token`` are the worker's."""

    def __init__(self, model: Model) -> None:
        self._experts = model.experts()
        self._n_layer = model.info.n_layer
        self._dense_layers = sorted(set(range(self._n_layer)) - set(model.info.moe_layers))
        self._n_answers = 0
        self.n_tokens = 0

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """An answer is made meanwhile."""
        self._n_answers += 1
        try:
            yield
        finally:
            self._n_answers -= 1

    def add_token(self) -> None:
        """A token was computed."""
        self.n_tokens += 1

    @contextlib.contextmanager
    def following(self) -> Iterator[Following]:
        """Somebody looks at the map meanwhile, so what tokens ask for is recorded."""
        with self._experts.watch() as watch:
            yield Following(self, watch)

    def snapshot(self, asked: Asked | None = None) -> dict[str, Any]:
        """The map now: by tier a row of characters for each of ``layers``; STATES says what they mean.

        ``asked`` shows over where host memory has an expert.
        """
        experts, places = self._experts, self._experts.places()
        tiers: dict[str, list[str]] = {}
        resident: dict[str, int] = {}
        if places is not None:
            tiers["host"], resident["host"] = _rows(places.host, asked), _count(places.host)
            if places.device is not None:
                tiers["device"], resident["device"] = _rows(places.device), _count(places.device)
        return {
            "object": "experts",
            "n_layer": self._n_layer,
            "n_expert": experts.n_expert,
            "layers": list(experts.layers),
            "dense_layers": self._dense_layers,
            "states": STATES,
            "tiers": tiers,
            "resident": resident,
            "n_tokens": self.n_tokens,
        }

    @property
    def is_answering(self) -> bool:
        return self._n_answers > 0


class Following:
    """One reader of the map, from one picture to the next."""

    def __init__(self, of: ExpertMap, watch: Watch) -> None:
        self._of = of
        self._watch = watch
        self._asked: Asked | None = None

    def snapshot(self) -> dict[str, Any]:
        """The map now, with what the last token asked for while an answer is made."""
        is_answering = self._of.is_answering  # before what it asked for
        if asked := self._watch.take():
            self._asked = (self._asked + asked if self._asked is not None else asked).last()
        elif not is_answering:
            self._asked = None
        return self._of.snapshot(self._asked)


def _count(codes: Codes) -> int:
    """What a token has hit or missed may be gone again, so rows do not tell."""
    return int((codes == RESIDENT).sum())


def _rows(codes: Codes, asked: Asked | None = None) -> list[str]:
    cells = np.full(codes.shape, _CODES["absent"], dtype=np.uint8)
    cells[codes == LOADING] = _CODES["loading"]
    cells[codes == RESIDENT] = _CODES["resident"]
    if asked is not None:
        cells[asked.rows, asked.experts] = np.where(asked.missed, _CODES["missed"], _CODES["hit"])
    return [row.tobytes().decode("ascii") for row in cells]
