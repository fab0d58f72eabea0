"""The patch set: ``patches/series``, the hook patches it lists, and our sources in ``patches/src``."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.errors import EngineBuildError

SERIES = "series"
SOURCES = "src"
_SOURCE_SUFFIXES = {".h", ".c", ".cpp", ".cmake"}
HEADER_FIELDS = ("What", "Why", "Upstream", "Drop when")
STOCK_FIELD = (
    "Stock"  # of a patch without which upstream does not compile or run here; says what it does then
)


def patches_dir() -> Path:
    """The directory of the patch set: package data of ``mobile_gguf.patches``."""
    import mobile_gguf.patches

    return Path(mobile_gguf.patches.__path__[0])


@dataclass(frozen=True)
class Patch:
    """One file of the series."""

    path: Path
    header: str  # everything before the first "diff --git"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def subject(self) -> str:
        """First line of the header."""
        return self.header.lstrip().partition("\n")[0].removeprefix("Subject: ")

    @property
    def fields(self) -> dict[str, str]:
        """``What: ...`` paragraphs of the header, by name; a paragraph ends at the next one."""
        names = "|".join(re.escape(name) for name in (*HEADER_FIELDS, STOCK_FIELD))
        pattern = rf"^({names}):(.*?)(?=^(?:{names}):|\Z)"
        found = re.findall(pattern, self.header, flags=re.MULTILINE | re.DOTALL)
        return {name: " ".join(text.split()) for name, text in found}

    @property
    def is_fix(self) -> bool:
        """Whether the stock library gets it too, since it could not be compared with otherwise."""
        return STOCK_FIELD in self.fields

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def read_series(directory: Path) -> list[Patch]:
    """The patches in the order in which they apply.

    Raises:
        EngineBuildError: ``series`` or a patch that it lists is missing.
    """
    series = directory / SERIES
    try:
        lines = series.read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        return [_read_patch(directory / name) for name in names]
    except FileNotFoundError as error:
        raise EngineBuildError(
            f"{error.filename} is missing although {series} needs it: restore it (git checkout), "
            f"or reinstall mobile-gguf"
        ) from None


def _read_patch(path: Path) -> Patch:
    # surrogateescape: a patch quotes upstream's bytes, which need not be UTF-8
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return Patch(path, text.partition("diff --git ")[0])


def read_sources(directory: Path) -> dict[str, Path]:
    """Our C and C++ files and the CMake files that list them, by their path below ``src``, sorted."""
    root = directory / SOURCES
    found = {
        path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.suffix in _SOURCE_SUFFIXES
    }
    return dict(sorted(found.items()))


def source_abi_version(directory: Path) -> int | None:
    """``MOBILE_ABI_VERSION`` of ``src/mobile.h``, None if there is no such file."""
    header = directory / SOURCES / "mobile.h"
    if not header.is_file():
        return None
    found = re.search(r"^#define MOBILE_ABI_VERSION (\d+)", header.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else None
