"""Model references: a path, ``demo``, the name of a model in the data directory, ``hf:org/repo[:quant]``."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from mobile_gguf.errors import ModelNotFoundError
from mobile_gguf.files.paths import models_dir

from .reference import PREFIX, is_reference, looks_like_repository, parse_reference

DEMO = "demo"
_DEPTH = 3
_OLLAMA = re.compile(r"(ollama:)?[\w.-]+:[\w.-]+")


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
    if text and path.is_dir():
        return _only_model_in(path)
    if text and path.exists():
        return path
    if not path.is_absolute() and ".." not in path.parts and text:
        for named in (models_dir() / text, models_dir() / f"{text}.gguf"):
            if named.is_file():
                return named
    raise ModelNotFoundError(
        f"no such model: {text or 'an empty name'} is neither a file nor in {models_dir()}; {_hint(text)}"
    )


def _hint(text: str) -> str:
    """What may have been meant."""
    names = {name.lower(): name for name in (DEMO, *map(model_name, local_models()))}
    stem = Path(text).name.removesuffix(".gguf").lower()
    near = difflib.get_close_matches(stem, names, 1, 0.7)
    if near and "/" not in text:
        return f"did you mean {names[near[0]]}?"
    if looks_like_repository(text):
        return f"if it is on the Hub, write {PREFIX}{text}"
    if _OLLAMA.fullmatch(text):
        return (
            "names of ollama's registry are not known here: find its GGUF on the Hub, and "
            f"`mobile-gguf pull {PREFIX}ORG/REPO:QUANT`"
        )
    return f"try `demo`; `mobile-gguf list` shows what is here, `mobile-gguf pull {PREFIX}ORG/REPO` gets more"


def is_at_hand(reference: str | os.PathLike[str]) -> bool:
    """Whether ``resolve_model`` would neither build nor ask the Hub; True of what is not there at all."""
    text = os.fspath(reference)
    if text == DEMO:
        return demo_file() is not None
    return not is_reference(text)


def local_models() -> list[Path]:
    """The GGUF files in the data directory that can be run by name; of split ones the first part.

    Folders in it may be linked in, such as LM Studio's, which has ``publisher/model/file.gguf``.
    """
    directory = models_dir()
    if not directory.is_dir():
        return []
    # not `**`, which follows no links
    found = [path for depth in range(_DEPTH) for path in sorted(directory.glob("*/" * depth + "*.gguf"))]
    demo = directory / DEMO
    return [
        path
        for path in found
        if _is_first_part(path) and path.parent != demo and not path.name.startswith("mmproj")
    ]


def model_name(path: Path) -> str:
    """The name that one of ``local_models`` is run by."""
    return path.relative_to(models_dir()).with_suffix("").as_posix()


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
