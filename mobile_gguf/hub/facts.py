"""Facts of GGUF files for lists: headers are read once and remembered until a file changes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import complete_or_absent
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.files.stamps import stamps
from mobile_gguf.gguf.caches import CacheRows, Caches, Sparse
from mobile_gguf.gguf.experts import ExpertLayer
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.wording import why

# of the remembered form: a new number forgets what was remembered
_VERSION = 6
_TUPLES = ("n_head", "moe_layers")


class FactsCache:
    """Remembers facts, and what is wrong with broken files, in ``cache_dir()/gguf-facts.json``."""

    def __init__(self) -> None:
        self._path = cache_dir() / "gguf-facts.json"
        self._known = self._load()
        self._used: dict[str, Any] = {}

    def read(self, path: Path, files: tuple[Path, ...]) -> tuple[GgufInfo | None, str]:
        """A model's facts without its metadata, or None and what is wrong; ``files``: all of a split one."""
        try:
            signature = stamps(files)
        except OSError as error:
            return None, f"cannot be read: {why(error)}"
        key = str(path.absolute())
        entry = self._known.get(key)
        if not isinstance(entry, dict) or entry.get("files") != signature:
            entry = {"files": signature, **_read(path)}
        self._used[key] = entry
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return (_from_json(entry["info"]) if entry["info"] else None), str(entry["problem"])
        del self._used[key]
        return None, "cannot be read"

    def save(self) -> None:
        """Remember what was read; what was not asked for is forgotten. An unwritable cache is none."""
        if self._used == self._known:
            return
        with contextlib.suppress(MobileError), complete_or_absent(self._path) as partial:
            partial.write_text(json.dumps({"version": _VERSION, "models": self._used}), encoding="utf-8")

    def _load(self) -> dict[str, Any]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            known = stored["models"] if stored["version"] == _VERSION else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if isinstance(known, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return {"info": _to_json(read_gguf_info(path)), "problem": ""}
    except MobileError as error:
        # the path is in the list already
        text = " ".join(str(error).split()).removeprefix(f"{path} ")
        return {"info": None, "problem": text}


def _to_json(info: GgufInfo) -> dict[str, Any]:
    values = {item.name: getattr(info, item.name) for item in dataclasses.fields(info)}
    del values["metadata"]
    values["path"], values["files"] = str(info.path), [str(path) for path in info.files]
    values["expert_layers"] = [dataclasses.asdict(layer) for layer in info.expert_layers]
    values["caches"] = dataclasses.asdict(info.caches)
    return values


def _from_json(values: dict[str, Any]) -> GgufInfo:
    layers = tuple(
        ExpertLayer(**{**layer, "matrix_bytes": tuple(layer["matrix_bytes"])})
        for layer in values["expert_layers"]
    )
    made = {
        **values,
        "path": Path(values["path"]),
        "files": tuple(map(Path, values["files"])),
        "expert_layers": layers,
        "caches": _caches(values["caches"]),
        **{name: tuple(values[name]) for name in _TUPLES},
    }
    return GgufInfo(**made)


def _caches(values: dict[str, Any]) -> Caches:
    made = {
        **values,
        "attention": CacheRows(**values["attention"]),
        "indexers": CacheRows(**values["indexers"]),
        "compressed": tuple(CacheRows(**rows) for rows in values["compressed"]),
        "sparse": Sparse(**values["sparse"]),
        "head_sizes": tuple(map(tuple, values["head_sizes"])),
    }
    return Caches(**made)
