"""Model references: a path, ``demo``, the name of a model in the data directory, ``hf:org/repo[:quant]``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mobile_gguf.errors import ModelNotFoundError
from mobile_gguf.files.paths import models_dir

from .reference import PREFIX, is_reference, looks_like_repository, parse_reference

DEMO = "demo"


def resolve_model(
    reference: str | os.PathLike[str], progress: Callable[[str, float], None] | None = None
) -> Path:
    """Return the GGUF that ``reference`` means; the demo model is built, one on the Hub pulled, if need be.

    A name is looked up as a path first, then among the models in the data directory; ``demo`` is always
    the demo model (a file of that name is ``./demo``). What was pulled before is used without asking the
    Hub. ``progress`` hears of a build and of a download. Raises ModelNotFoundError, and what
    ``hub.pull`` raises.
    """
    text = os.fspath(reference)
    if text == DEMO:
        from mobile_gguf.demo import ensure_demo

        return ensure_demo(progress=progress)
    if is_reference(text):
        from . import resolve_hub

        return resolve_hub(parse_reference(text), progress)
    path = Path(text).expanduser()
    if path.is_dir():
        return _only_model_in(path)
    if path.exists():
        return path
    if path.name == text:
        for named in (models_dir() / text, models_dir() / f"{text}.gguf"):
            if named.is_file():
                return named
    hint = "try `demo`"
    if looks_like_repository(text):
        hint = f"if it is on the Hub, write {PREFIX}{text}"
    raise ModelNotFoundError(f"no such model: {text} is neither a file nor in {models_dir()}; {hint}")


def is_at_hand(reference: str | os.PathLike[str]) -> bool:
    """Whether ``resolve_model`` would neither build nor ask the Hub; True of what is not there at all."""
    text = os.fspath(reference)
    if text == DEMO:
        return demo_file() is not None
    return not is_reference(text)


def local_models() -> list[Path]:
    """The GGUF files in the data directory that can be run by name; of split ones the first part."""
    directory = models_dir()
    if not directory.is_dir():
        return []
    return [path for path in sorted(directory.glob("*.gguf")) if _is_first_part(path)]


def demo_file() -> Path | None:
    """The demo model's file if it has been built."""
    from mobile_gguf.demo.build import demo_path

    path = demo_path()
    return path if path.is_file() else None


def _only_model_in(directory: Path) -> Path:
    found = [path for path in sorted(directory.glob("*.gguf")) if _is_first_part(path)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} GGUF files; give one of them" if found else "no GGUF file"
    raise ModelNotFoundError(f"{directory} is a directory with {what}")


def _is_first_part(path: Path) -> bool:
    head, separator, _ = path.stem.rpartition("-of-")
    return not separator or not head[-5:].isdigit() or head.endswith("00001")
