"""Where references within one schema lead."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote


class References:
    """Finds what ``#``, ``#/pointer`` and ``#anchor`` mean in ``root``; nothing is fetched."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._anchors: dict[str, Any] = {}
        self.has_inner_ids = False
        own = root.get("$id") if isinstance(root, dict) else None
        self._own = own.rstrip("#") if isinstance(own, str) else ""
        pending = [root]
        while pending:
            part = pending.pop()
            if isinstance(part, dict):
                if isinstance(name := part.get("$anchor"), str):
                    self._anchors.setdefault(name, part)
                if part is not root and isinstance(part.get("$id"), str):
                    self.has_inner_ids = True
                pending += part.values()
            elif isinstance(part, list):
                pending += part

    def find(self, reference: str) -> Any:
        """The schema that ``reference`` means; KeyError if there is none here."""
        if self._own and reference.startswith(self._own):
            reference = reference[len(self._own) :] or "#"
        if not reference.startswith("#"):
            raise KeyError(reference)
        place = unquote(reference[1:])
        if place and not place.startswith("/"):
            return self._anchors[place]
        found = self._root
        for name in place.split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise KeyError(reference)
        if not isinstance(found, (dict, bool)):
            raise KeyError(reference)
        return found
