"""Responses that may be gone on with by their id: in memory, the last ones, until the server ends."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..failures import ApiError

MAX_RESPONSES, MAX_BYTES = 256, 32 << 20


@dataclass(frozen=True)
class KeptResponse:
    """A response, with all items of its conversation before it."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    n_bytes: int


class KeptResponses:
    """The last responses, at most so many, and of so many bytes of JSON."""

    def __init__(self, most: int = MAX_RESPONSES, most_bytes: int = MAX_BYTES) -> None:
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()
        self._most, self._most_bytes = most, most_bytes
        self._n_bytes = 0

    def keep(self, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """Remember a response; the oldest ones go for it."""
        n_bytes = len(json.dumps([response, items]))
        if n_bytes > self._most_bytes:
            return
        self._kept[response["id"]] = KeptResponse(response, items, n_bytes)
        self._n_bytes += n_bytes
        while len(self._kept) > self._most or self._n_bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._n_bytes -= oldest.n_bytes

    def get(self, id: str, param: str | None = None) -> KeptResponse:
        """A response by its id. Raises ApiError where it is not here any more."""
        kept = self._kept.get(id)
        if kept is None:
            raise ApiError(
                404 if param is None else 400,
                f"the response {ascii(id)[:80]} is not here: the last {self._most} are kept in memory until "
                "the server ends, but for those with store: false; send the whole conversation as input",
                param=param,
                code="previous_response_not_found" if param is not None else "response_not_found",
            )
        return kept

    def drop(self, id: str) -> None:
        """Forget a response. Raises ApiError where it is not here."""
        self._n_bytes -= self.get(id).n_bytes
        del self._kept[id]
